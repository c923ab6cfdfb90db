"""The report's charts as plain dict figures for plotly.js; what they have in common (fonts, axes) is in page.js.

Colours are names of the style sheet's variables (`--series-1`) or places on its ramp (`ramp:0.5`), which page.js looks
up: so one figure serves light, dark and print. Every name that a user can choose is HTML-escaped, since plotly.js reads
a few tags in text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from html import escape
from typing import Any

from himoe.report.read import RunFolder, table
from himoe.report.series import LayerHistory, LoadHistory, Series, series

NUM_COLOURS = 6
SYMBOLS = ("circle", "square", "diamond", "x", "triangle-up")
MAX_LEGEND = 12
LOAD_SCALE = [[0, "--load-none"], [0.25, "--load-less"], [0.5, "--load-fair"], [0.75, "--load-more"], [1, "--load-twice"]]


@dataclass
class Chart:
    """A figure with the words around it; `height` in pixels, `switches` are (label, axis) pairs of linear/log buttons."""

    title: str
    traces: list[dict[str, Any]]
    caption: str = ""
    layout: dict[str, Any] = field(default_factory=dict)
    height: int = 300
    switches: tuple[tuple[str, str], ...] = ()

    @property
    def empty(self) -> bool:
        """True when no trace has a value to draw."""
        return not any(value is not None for trace in self.traces for value in trace.get("y", trace.get("z", [])))


def rounded(values: Iterable[float | None], digits: int = 5) -> list[float | None]:
    """Return the values with so many significant digits: half the size of the page."""
    return [None if value is None else float(f"{value:.{digits}g}") for value in values]


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Return a plotly axis with a title."""
    return {"title": {"text": title}, **more}


def _line(curve: Series, name: str, colour: str, **more: Any) -> dict[str, Any]:
    few = sum(value is not None for value in curve.y) == 1
    mode = more.pop("mode", "markers" if few else "lines")
    return {
        "type": "scatter",
        "mode": mode,
        "name": escape(name, quote=False),
        "x": rounded(curve.x, 9),
        "y": rounded(curve.y),
        "line": {"color": colour, "width": 2, **more.pop("line", {})},
        "marker": {"color": colour, "size": 6, **more.pop("marker", {})},
        "hovertemplate": "%{y:.4~g}",
        **more,
    }


def _band(curve: Series, colour: str) -> list[dict[str, Any]]:
    """Return the area between a pooled curve's lowest and highest values."""
    if not curve.low:
        return []
    edge = {"type": "scatter", "mode": "lines", "x": rounded(curve.x, 9), "line": {"width": 0}}
    quiet = {"hoverinfo": "skip", "showlegend": False}
    low = {**edge, **quiet, "y": rounded(curve.low)}
    return [low, {**edge, **quiet, "y": rounded(curve.high), "fill": "tonexty", "fillcolor": colour}]


def _domain_style(index: int) -> dict[str, Any]:
    colour = f"--series-{index % NUM_COLOURS + 1}"
    symbol = SYMBOLS[index // NUM_COLOURS % len(SYMBOLS)]
    return {"colour": colour, "mode": "lines+markers", "marker": {"symbol": symbol}}


def _per_domain(run: RunFolder, key: str) -> list[dict[str, Any]]:
    traces = []
    for i, name in enumerate(run.domains):
        curve = series(run.evals, "tokens", lambda line, n=name: table(table(line.get("domains")).get(n)).get(key))
        traces.append(_line(curve, name, **_domain_style(i)))
    return traces


def loss_chart(run: RunFolder) -> Chart:
    """Cross-entropy over tokens: training, and held-out per domain."""
    training = series(run.train, "tokens", lambda line: line.get("loss"))
    caption = "Pure cross-entropy in nats per token, without auxiliary terms. Lower is better."
    if training.low:
        caption += " The band spans the lowest and highest value behind each point of the training curve."
    return Chart(
        "Cross-entropy",
        [*_band(training, "--band"), _line(training, "training", "--quiet", line={"width": 1.5}), *_per_domain(run, "loss")],
        caption,
        {"xaxis": axis("training tokens"), "yaxis": axis("nats per token"), "showlegend": len(run.domains) < MAX_LEGEND},
        height=380,
        switches=(("loss", "yaxis"), ("tokens", "xaxis")),
    )


def bits_chart(run: RunFolder) -> Chart:
    """Held-out bits per byte over tokens, with each domain's byte-bigram model as a dashed line."""
    traces = _per_domain(run, "bits_per_byte")
    ends = [line.get("tokens") for line in (run.evals[0], run.evals[-1])] if run.evals else []
    few = len(run.domains) <= NUM_COLOURS
    for i, name in enumerate(run.domains if few and len(run.evals) > 1 else []):
        bigram = run.baselines.get(name, {}).get("bigram")
        colour = _domain_style(i)["colour"]
        line = _line(Series(ends, [bigram] * 2), f"{name}: bigram", colour, line={"dash": "dash", "width": 1.25})
        traces.append({**line, "mode": "lines", "hoverinfo": "skip", "hovertemplate": None, "showlegend": False})
    return Chart(
        "Bits per byte on held-out text",
        traces,
        "Bits needed per byte of text: comparable between tokenizers. Dashed: the byte-bigram model of the same text."
        if few
        else "Bits needed per byte of text: comparable between tokenizers.",
        {"xaxis": axis("training tokens"), "yaxis": axis("bits per byte"), "showlegend": len(run.domains) < MAX_LEGEND},
        height=380,
        switches=(("bits per byte", "yaxis"), ("tokens", "xaxis")),
    )


def heat_map(history: LayerHistory, loads: LoadHistory, num_groups: int) -> Chart:
    """Load of every expert of one layer over time, 1 = fair share, with the groups' borders and names."""
    experts = len(history.ratio[0])
    size = experts // num_groups if experts % num_groups == 0 else experts
    groups = experts // size
    yaxis = axis("expert", autorange="reversed", showgrid=False, zeroline=False, ticks="")
    shapes = []
    if groups > 1:
        shown = range(0, groups, -(-groups // 8))
        names = [f"group {g}<br>{g * size}–{(g + 1) * size - 1}" if size > 1 else f"group {g}" for g in shown]
        yaxis |= {"title": None, "tickvals": [g * size + (size - 1) / 2 for g in shown], "ticktext": names}
        for g in range(1, groups):
            line = {"color": "--surface", "width": 3 if groups <= 16 else 1}
            shapes.append({"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": g * size - 0.5, "y1": g * size - 0.5, "line": line})
    trace = {
        "type": "heatmap",
        "x": rounded(loads.edges, 9),
        "z": [rounded(row, 3) for row in zip(*history.ratio, strict=True)],
        "zmin": 0,
        "zmax": 2,
        "colorscale": LOAD_SCALE,
        "showscale": False,
        "hoverongaps": False,
        "hovertemplate": "expert %{y} · step %{x:.0f}<br><b>%{z:.2f}</b> × fair share<extra></extra>",
    }
    layout = {"xaxis": axis("step", showgrid=False), "yaxis": yaxis, "shapes": shapes, "hovermode": "closest"}
    return Chart(f"Layer {history.layer}", [trace], "", layout, height=min(640, max(230, 90 + 13 * experts)))


def layer_chart(loads: LoadHistory, name: str, title: str, caption: str, **layout: Any) -> Chart:
    """One statistic of every layer over steps; layers take their colour from the ramp, first to last."""
    count = len(loads.layers)
    traces = []
    for i, layer in enumerate(loads.layers):
        colour = f"ramp:{i / max(1, count - 1):.3f}"
        traces.append(_line(Series(list(loads.ends), layer.statistics[name]), f"layer {layer.layer}", colour))
    many = count > MAX_LEGEND
    if many:
        caption += " Colours run from the first layer (violet) to the last (yellow-green)."
    merged = {"xaxis": axis("step"), "showlegend": count <= MAX_LEGEND, "hovermode": "closest" if many else "x unified", **layout}
    if many:
        traces = [{**trace, "hovertemplate": f"{trace['name']}, step %{{x}}: %{{y:.4~g}}<extra></extra>"} for trace in traces]
    return Chart(title, traces, caption, merged)


def bounded_layout(low: float, low_text: str, high_text: str) -> dict[str, Any]:
    """Return a layout for a statistic in [low, 1], with both bounds drawn and named."""
    pad = 0.09 * (1 - low) or 0.1
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "line": {"color": "--quiet", "width": 1, "dash": "dot"}}
    text = {"xref": "paper", "x": 1, "xanchor": "right", "showarrow": False, "font": {"color": "--muted", "size": 11}}
    return {
        "yaxis": axis("", range=[low - pad, 1 + pad]),
        "shapes": [{**line, "y0": y, "y1": y} for y in (low, 1.0)],
        "annotations": [
            {**text, "y": 1, "yanchor": "bottom", "text": high_text},
            {**text, "y": low, "yanchor": "top", "text": low_text},
        ],
    }


def step_charts(run: RunFolder) -> list[Chart]:
    """Return the small charts of the optimisation over steps."""
    names = list(dict.fromkeys(name for line in run.train for name in table(line.get("aux"))))
    curves: list[tuple[str, str, Callable[[dict[str, Any]], Any]]] = [
        ("Learning rate", "", lambda line: line.get("lr")),
        ("Gradient norm", "Before clipping.", lambda line: line.get("grad_norm")),
        ("Tokens per second", "", lambda line: line.get("tokens_per_second")),
    ]
    charts = [
        Chart(
            "Auxiliary losses",
            [
                _line(series(run.train, "step", lambda line, n=name: table(line.get("aux")).get(n)), name, f"--series-{i % NUM_COLOURS + 1}")
                for i, name in enumerate(names)
            ],
            "Weighted and summed over layers, as added to the training loss; a negative one rewards.",
            {"xaxis": axis("step")},
        )
    ]
    for title, caption, get in curves:
        curve = series(run.train, "step", get)
        traces = [*_band(curve, "--band"), _line(curve, title, "--series-1", line={"width": 1.5})]
        layout = {"xaxis": axis("step"), "yaxis": {"rangemode": "tozero"}, "showlegend": False}
        charts.append(Chart(title, traces, caption, layout))
    return charts
