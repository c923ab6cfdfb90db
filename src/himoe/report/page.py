"""The HTML of the report: a document with everything in it, made of sections, tables and chart cards.

The page asks nobody for anything: plotly.js, the style sheet and the data are in it, and its Content-Security-Policy
forbids the browser every request.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from himoe.errors import HimoeError, MissingExtraError
from himoe.files import write_text
from himoe.report.charts import Chart

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'"
)


def write_document(build: Callable[[str], str], out: Path, *, extra: str, error: type[HimoeError]) -> Path:
    """Write what `build` makes of plotly.js; the file appears complete or not at all. Return where it is.

    Raises:
        MissingExtraError: plotly, which the extra brings, is not installed.
        HimoeError: of the kind `error`, where it cannot be written.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as missing:
        raise MissingExtraError("plotly", extra) from missing
    page = build(get_plotlyjs())
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page)
    except OSError as cause:
        raise error(f"cannot write the report to {out}: {cause.strerror}; give another file with --out") from cause
    return out


def tile(label: str, value: str, hint: str, unit: str = "") -> str:
    """Return one of the large numbers at the top of a page; all are HTML."""
    unit = f'<span class="unit">{unit}</span>' if unit else ""
    return f'<div class="tile"><dt>{label}</dt><dd class="value">{value}{unit}</dd><dd class="hint">{hint}</dd></div>'


def html_table(head: list[str], rows: list[list[str]], label: str, total: bool = False) -> str:
    """Return a table inside a box that scrolls; cells are HTML already, `total` sets the last row apart."""
    marks = [' class="total"' if total and i == len(rows) - 1 else "" for i in range(len(rows))]
    body = "".join(
        f"<tr{mark}><th scope=row>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>"
        for mark, row in zip(marks, rows, strict=True)
    )
    top = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    return (
        f'<div class="scroll" tabindex=0 role=region aria-label="{label}"><table>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


class Page:
    """Collects sections and the figures in them, then returns the document."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.figures: dict[str, dict[str, Any]] = {}
        self.parts: list[str] = []

    def section(self, title: str, content: str) -> None:
        """Add a section unless it would be empty."""
        if content:
            self.parts.append(f"<section><h2>{title}</h2>{content}</section>")

    def grid(self, some: list[Chart]) -> str:
        """Return the cards of those charts that have something to show."""
        cards = "".join(self.card(chart) for chart in some if not chart.empty)
        return f'<div class="grid">{cards}</div>' if cards else ""

    def card(self, chart: Chart) -> str:
        """Keep the figure for the script and return its box."""
        key = f"chart-{len(self.figures)}"
        self.figures[key] = {"traces": chart.traces, "layout": {**chart.layout, "height": chart.height}}
        switches = "".join(
            f"<button type=button data-chart={key} data-axis={axis} aria-pressed=false"
            f' title="Logarithmic axis on or off">log {label}</button>'
            for label, axis in chart.switches
        )
        file = escape(f"{self.name}-{chart.title}".replace(" ", "-"))
        save = f'<button type=button data-save={key} data-name="{file}" title="Save this chart as a PNG">PNG</button>'
        caption = f"<figcaption>{chart.caption}</figcaption>" if chart.caption else ""
        return (
            f'<figure class="card"><div class="head"><h3>{chart.title}</h3><div class="switches">{save}{switches}</div>'
            f'</div><div class="chart" id={key} style="height:{chart.height}px" role=img'
            f' aria-label="Chart: {chart.title}"></div>{caption}</figure>'
        )

    def document(self, plotly_js: str) -> str:
        """Return the whole HTML text."""
        here = files("himoe.report")
        style, script = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
        data = json.dumps(self.figures, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
            f"<title>{escape(self.name)} · himoe report</title><style>{style}</style></head>"
            f"<body><main>{''.join(self.parts)}"
            "<noscript><p>The charts of this page need JavaScript; the tables do not.</p></noscript></main>"
            f'<script type="application/json" id="figures">{data}</script>'
            f"<script>{plotly_js}</script><script>{script}</script></body></html>\n"
        )
