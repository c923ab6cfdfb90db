"""The comparison as one HTML file that needs no network: for each backend, the peers' time over ours in every case."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from himoe.bench.ratios import case_name
from himoe.errors import MissingExtraError
from himoe.files import write_text

# Apart for the common kinds of colour blindness, on white and on black.
COLOURS = ("#0b6fb8", "#d1652b", "#0f9d6e", "#a65a94", "#c99400", "#4f8fd6", "#7a7f87", "#b8352f")
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>himoe bench layer</title><style>
html {{ color-scheme: light; }}
body {{ margin: 0 auto; max-width: 1100px; padding: 24px 16px 48px; color: #1b1f24; background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
h1 {{ font-size: 26px; line-height: 1.2; }} h2 {{ font-size: 18px; margin: 40px 0 4px; }}
p {{ margin: 4px 0; color: #5f6770; max-width: 72ch; overflow-wrap: anywhere; }}
</style></head><body><h1>The expert layer against its peers</h1>
<p>{about}</p><p>Time of a peer over ours, forward and backward, fastest repeats: right of 1, ours is faster. The axis
is logarithmic.</p>{charts}<script>{plotly}</script><script>{script}</script></body></html>
"""
SCRIPT = """
const figures = {figures};
for (const [id, figure] of Object.entries(figures)) {{
  const narrow = innerWidth < 600;
  figure.layout.margin.l = narrow ? 118 : 210;
  figure.layout.yaxis.tickfont = {{size: narrow ? 10 : 13}};
  Plotly.newPlot(id, figure.data, figure.layout, {{responsive: true, displayModeBar: false}});
}}
"""
PIXELS = 15  # of a bar
TICKS = [float(f"{digit}e{power}") for power in range(-2, 4) for digit in (1, 2, 5)]


def write_plot(result: Mapping[str, Any], path: Path) -> None:
    """Write the page; raises MissingExtraError without plotly."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtraError("plotly", "report") from error
    import json

    backends = list(dict.fromkeys(name for row in result["rows"] for name in row["backends"]))
    figures = {f"chart-{number}": _figure(result, name) for number, name in enumerate(backends)}
    charts = "".join(
        f'<h2>{escape(name)}</h2><div id="chart-{number}" role="img" aria-label="Ratios of {escape(name)}"></div>'
        for number, name in enumerate(backends)
    )
    machine = result["environment"]
    about = (
        f"{machine['cpu'] if machine['device'] == 'cpu' else machine['device']}, {machine['threads']} threads, "
        f"torch {machine['torch']}"
    )
    script = SCRIPT.format(figures=json.dumps(figures, allow_nan=False).replace("<", "\\u003c"))
    write_text(path, PAGE.format(about=escape(about), charts=charts, plotly=get_plotlyjs(), script=script))


def _figure(result: Mapping[str, Any], backend: str) -> dict[str, Any]:
    """Return one chart: a group of bars for every case, a colour for every peer."""
    rows = [row for row in result["rows"] if backend in row["backends"]]
    peers = list(dict.fromkeys(peer for row in rows for peer in row["backends"][backend]["ratio_vs"]))
    data = []
    for peer, colour in zip(peers, COLOURS, strict=False):
        pairs = [(case_name(row), row["backends"][backend]["ratio_vs"].get(peer)) for row in rows]
        shown = [(name, ratio) for name, ratio in pairs if ratio is not None]
        data.append({
            "type": "bar", "orientation": "h", "name": peer, "marker": {"color": colour},
            "y": [name.replace(" ", "<br>", 1) for name, _ in shown], "x": [ratio - 1 for _, ratio in shown], "base": 1,
            "customdata": [ratio for _, ratio in shown],
            "hovertemplate": f"{peer}: %{{customdata:.2f}}<extra></extra>",
        })  # fmt: skip
    line = {
        "type": "line",
        "x0": 1,
        "x1": 1,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": {"color": "#1b1f24", "width": 1},
    }
    return {
        "data": data,
        "layout": {
            "barmode": "group",
            "height": 110 + PIXELS * max(1, len(peers)) * len(rows) * 4 // 3,
            "margin": {"t": 40, "r": 16, "b": 40},
            "xaxis": {
                "type": "log",
                "title": {"text": "time of the peer / ours"},
                "gridcolor": "#e6e7e4",
                "tickvals": TICKS,
                "ticktext": [f"{tick:g}" for tick in TICKS],
            },
            "yaxis": {"autorange": "reversed"},
            "legend": {"orientation": "h", "y": 1, "yanchor": "bottom"},
            "shapes": [line],
            "font": {"family": "system-ui, sans-serif", "color": "#1b1f24"},
            "paper_bgcolor": "#fff",
            "plot_bgcolor": "#fff",
        },
    }
