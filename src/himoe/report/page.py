"""Puts the report's one HTML page together: headline, tables, charts, and how to run it again.

The page asks nobody for anything: plotly.js, the style sheet and the data are in it, and its Content-Security-Policy
forbids the browser every request. All text that a run brings along is HTML-escaped.
"""

from __future__ import annotations

import json
import shlex
from html import escape
from importlib.resources import files
from typing import Any

from himoe.report import charts
from himoe.report.charts import Chart
from himoe.report.read import RunFolder, number, table
from himoe.report.series import LoadHistory, load_history

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'"
NOTHING = "–"

MAX_VIO_TEXT = (
    "<b>MaxVio</b> is how far the busiest expert is above its fair share: 0 means perfectly even, 1 means it gets twice"
    " its share. <b>Batch</b> looks at each optimizer step alone, <b>window</b> at the last 50 steps added together,"
    " which takes out the luck of a single batch."
)
LOAD_TEXT = (
    "Each row is an expert, each column an interval of training. Colour is the expert's load (the token–expert pairs it"
    " worked on) divided by the layer's mean: <b>1 is its fair share</b>. The scale is the same for all layers."
)
MASS_TEXT = (
    "For each token the router spreads a probability of 1 over all experts. <b>Σm²</b> says how that probability is"
    " divided <i>between</i> the groups: low when every group gets an equal part, so that all groups (devices) share the"
    " work; 1 when a token lives in one group alone. <b>C</b> says how decided the router is <i>inside</i> a group: low when"
    " a group's experts are all the same to it, 1 when it puts everything on one of them, so that experts specialise."
    " Hi-MoE pushes the first down and the second up."
)


def show(value: Any, digits: int = 3) -> str:
    """Return a number with so many decimals, or a dash when there is none."""
    given = number(value)
    return NOTHING if given is None else f"{given:,.{digits}f}".replace("-", "−")


def count(value: Any) -> str:
    """Return a count for people: 950, 12.3k, 4.10M, 1.05B."""
    given = number(value)
    if given is None:
        return NOTHING
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(given) >= limit:
            return f"{given / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{given:,.0f}"


def size(value: Any) -> str:
    """Return bytes for people, in units of 1024."""
    given = number(value)
    if given is None:
        return NOTHING
    for unit in ("bytes", "KiB", "MiB"):
        if given < 1024:
            return f"{given:.0f} {unit}" if unit == "bytes" else f"{given:.3g} {unit}"
        given /= 1024
    return f"{given:,.4g} GiB"


def duration(value: Any) -> str:
    """Return seconds for people: 42 s, 3 min 12 s, 2 h 5 min."""
    seconds = round(number(value) or 0)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def saved(bits: Any, baseline: Any) -> str:
    """Return by how many percent `bits` is under `baseline`."""
    ours, theirs = number(bits), number(baseline)
    return NOTHING if ours is None or not theirs else show(100 * (1 - ours / theirs), 1) + " %"


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

    def __init__(self) -> None:
        self.figures: dict[str, dict[str, Any]] = {}
        self.parts: list[str] = []

    def section(self, title: str, *parts: str) -> None:
        """Add a section unless it would be empty."""
        if any(parts[-1:]):
            self.parts.append(f"<section><h2>{title}</h2>{''.join(parts)}</section>")

    def grid(self, some: list[Chart], wide: bool = False) -> str:
        """Return the cards of those charts that have something to show."""
        cards = "".join(self.card(chart) for chart in some if not chart.empty)
        return f'<div class="grid{" wide" if wide else ""}">{cards}</div>' if cards else ""

    def card(self, chart: Chart) -> str:
        """Keep the figure for the script and return its box."""
        key = f"chart-{len(self.figures)}"
        self.figures[key] = {"traces": chart.traces, "layout": {**chart.layout, "height": chart.height}}
        switches = "".join(
            f'<button type=button data-chart={key} data-axis={axis} aria-pressed=false title="Logarithmic axis on or off">'
            f"log {label}</button>"
            for label, axis in chart.switches
        )
        caption = f"<figcaption>{chart.caption}</figcaption>" if chart.caption else ""
        return (
            f'<figure class="card"><div class="head"><h3>{chart.title}</h3><div class="switches">{switches}</div></div>'
            f'<div class="chart" id={key} style="height:{chart.height}px" role=img aria-label="Chart: {chart.title}"></div>'
            f"{caption}</figure>"
        )

    def document(self, title: str, plotly_js: str) -> str:
        """Return the whole HTML text."""
        here = files("himoe.report")
        style, script = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
        data = json.dumps(self.figures, allow_nan=False, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
            f"<title>{escape(title)} · himoe report</title><style>{style}</style></head><body><main>{''.join(self.parts)}"
            "<noscript><p>The charts of this page need JavaScript; the tables do not.</p></noscript></main>"
            f'<script type="application/json" id="figures">{data}</script>'
            f"<script>{plotly_js}</script><script>{script}</script></body></html>\n"
        )


def build_page(run: RunFolder, plotly_js: str) -> str:
    """Return the report of `run` as one HTML document."""
    page, loads = Page(), load_history(run)
    page.parts.append(_headline(run))
    page.section("Learning", page.grid([charts.loss_chart(run), charts.bits_chart(run)]))
    page.section("Held-out text by domain", _domain_table(run))
    _balance(page, run, loads)
    page.section("Optimisation", page.grid(charts.step_charts(run)))
    page.section("Run it again", _again(run))
    page.parts.append(f"<footer>Made by himoe {escape(str(run.env.get('himoe') or ''))} from the run folder alone.</footer>")
    return page.document(run.name, plotly_js)
