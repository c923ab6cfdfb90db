"""A comparison as one self-contained HTML page, in the style of a run's report."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from himoe.analysis.comparison import BALANCE, LEVELS, Comparison
from himoe.analysis.paired import Verdict
from himoe.analysis.settings import Mean
from himoe.errors import DataError
from himoe.report.charts import Chart, axis, rounded, style_of
from himoe.report.numbers import NOTHING, count, duration, show, text_of
from himoe.report.page import Page, html_table, write_document

NAMES = {"cv": "CV", "max_vio": "MaxVio"}
ROW, AROUND = 34, 110
"""Pixels of a strategy's row in a chart, and of what is around the rows."""


def write_comparison(found: Comparison, out: Path) -> Path:
    """Write the page of a comparison; the file appears complete or not at all.

    Raises:
        DataError: it cannot be written.
        MissingExtraError: plotly is not installed.
    """
    return write_document(build_page(found).document, out, extra="analysis", error=DataError)


def build_page(found: Comparison) -> Page:
    """Return the page with all its sections."""
    page = Page(found.sweep.name)
    page.parts.append(_headline(found))
    page.section("Verdict", _verdict(found) + page.grid([difference_chart(found), seed_chart(found)]))
    page.section("Strategies", _strategies(found))
    page.section("Cost", _cost(found))
    page.section("Bits per byte by domain", _domains(found) + page.grid([domain_chart(found)]))
    page.section("Balance of the load", _balance(found) + page.grid(balance_charts(found)))
    page.section("Learning", page.grid([curve_chart(found)]))
    page.section("Learning rate", _tuning(found) + page.grid([tuning_chart(found)]))
    page.section("Runs left out", _left(found))
    page.parts.append(
        "<footer>Made by himoe from the table of the runs alone. Drag over a chart to zoom in, double-click to zoom"
        " out; click a name in a legend to hide it.</footer>"
    )
    return page


def _tile(label: str, value: str, hint: str) -> str:
    return f'<div class="tile"><dt>{label}</dt><dd class="value">{value}</dd><dd class="hint">{hint}</dd></div>'


def _headline(found: Comparison) -> str:
    strategies = found.strategies
    seeds = max(one.loss.n for one in strategies)
    row = next(iter(strategies[0].rows.values()))
    names = ", ".join(one.name for one in strategies)
    notes = "".join(f'<p class="note">{text_of(note)}.</p>' for note in found.notes)
    words = [one.word for one in found.verdicts]
    tiles = [
        _tile("Lowest loss", text_of(strategies[0].name), f"{show(strategies[0].loss.value, 4)} nats per token"),
        _tile(f"Better than {text_of(found.against)}", str(words.count("better")), f"of {len(words)} strategies"),
        _tile(f"Worse than {text_of(found.against)}", str(words.count("worse")),
              f"no difference seen: {words.count('no difference seen')}"),
        _tile("Tokens of a run", count(row["tokens"]), f"{seeds} seeds of each strategy"),
    ]  # fmt: skip
    return (
        '<header><p class="eyebrow">Comparison</p>'
        f'<h1>{text_of(found.sweep.name)}</h1><p class="lead"><b>{text_of(names)}</b>: the same data in the same order'
        f" for each seed, at one learning rate.</p>{notes}</header><dl class=tiles>{''.join(tiles)}</dl>"
    )


def _verdict(found: Comparison) -> str:
    lines = "".join(f"<li>{text_of(one.sentence())}.</li>" for one in found.verdicts)
    return (
        f"<p>On the validation cross-entropy, without auxiliary terms, each strategy against {text_of(found.against)}:"
        f" Student’s test on the differences seed by seed, corrected by Holm’s method.</p><ul>{lines}</ul>"
    )


def _colours(found: Comparison) -> dict[str, dict[str, Any]]:
    """Return the style of every strategy, the same in all charts."""
    return {one.name: style_of(i) for i, one in enumerate(found.strategies)}


def difference_chart(found: Comparison) -> Chart:
    """Return each strategy's difference with its intervals, and the seeds behind it."""
    base = next(one for one in found.strategies if one.name == found.against)
    verdicts = {one.name: one for one in found.verdicts}
    shown = [one for one in found.strategies[::-1] if one.name in verdicts]
    names = [escape(one.name) for one in shown]
    told = [verdicts[one.name] for one in shown]
    ends = [(one.difference, one.low, one.high) for one in told]
    marks = {
        "type": "scatter",
        "mode": "markers",
        "name": "mean and 95 % interval",
        "x": rounded([one.difference for one in told]),
        "y": names,
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": rounded([0.0 if high is None else high - mean for mean, _, high in ends]),
            "arrayminus": rounded([0.0 if low is None else mean - low for mean, low, _ in ends]),
            "color": "--series-1",
            "thickness": 2,
            "width": 6,
        },
        "marker": {"color": "--series-1", "size": 10},
        "text": [one.word for one in told],
        "hovertemplate": "<b>%{x:+.4f}</b> nats<br>%{text}<extra></extra>",
    }
    dots: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "name": "one seed",
        "x": [],
        "y": [],
        "text": [],
        "marker": {"color": "--quiet", "size": 6, "opacity": 0.8},
        "hovertemplate": "%{x:+.4f}, seed %{text}<extra></extra>",
    }
    for one, name in zip(shown, names, strict=True):
        for seed in verdicts[one.name].seeds:
            difference = float(one.rows[seed]["cross_entropy"]) - float(base.rows[seed]["cross_entropy"])
            dots["x"] += rounded([difference])
            dots["y"].append(name)
            dots["text"].append(str(seed))
    zero = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": 0, "x1": 0}
    layout = {
        "xaxis": axis(f"loss less that of {escape(found.against)}, nats per token"),
        "yaxis": {"type": "category", "automargin": True},
        "shapes": [{**zero, "line": {"color": "--quiet", "width": 1}}],
        "hovermode": "closest",
        "showlegend": True,
    }
    caption = (
        "To the left of the line: better. The interval is of one comparison alone, the verdict counts all of them."
    )
    return Chart(f"Difference to {escape(found.against)}", [dots, marks], caption, layout, AROUND + ROW * len(shown))


def seed_chart(found: Comparison) -> Chart:
    """Return the loss of every run, a line for each strategy over the seeds."""
    seeds = sorted({seed for one in found.strategies for seed in one.rows}, key=str)
    traces = []
    for one in found.strategies:
        style = _colours(found)[one.name]
        losses = [float(one.rows[seed]["cross_entropy"]) if seed in one.rows else None for seed in seeds]
        traces.append(_named(one.name, style, x=[str(seed) for seed in seeds], y=rounded(losses), mode="lines+markers"))
    layout = {"xaxis": axis("seed", type="category"), "yaxis": axis("nats per token"), "showlegend": True,
              "hovermode": "closest"}  # fmt: skip
    caption = "Lines that go up and down together: the seed moves all strategies alike, and pairing takes it out."
    return Chart("Loss seed by seed", traces, caption, layout, height=340)


def _named(name: str, style: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": escape(name, quote=False),
        "line": {"color": style["colour"], "width": 2, **style["line"]},
        "marker": {"color": style["colour"], "size": 7},
        "hovertemplate": f"<b>%{{y:.4f}}</b><br>{escape(name)}<extra></extra>",
        **more,
    }


def _strategies(found: Comparison) -> str:
    head = ["Strategy", "Loss", "± 95 %", "Difference", "95 % interval", "Bootstrap (BCa)", "p, Holm", "Would be seen",
            "Bits per byte"]  # fmt: skip
    rows = []
    for one in found.strategies:
        bits = NOTHING if one.bits_per_byte is None else show(one.bits_per_byte.value, 4)
        cells = _verdict_cells(found.verdict_of(one.name))
        rows.append([f"<b>{text_of(one.name)}</b>", show(one.loss.value, 4), _half(one.loss), *cells, bits])
    text = (
        f"<p>Means over seeds, the lowest loss first. <b>Would be seen</b>: the smallest true difference to"
        f" {text_of(found.against)} that this many seeds and this spread show four times in five. The bootstrap"
        " interval is a check and decides nothing.</p>"
    )
    return text + html_table(head, rows, "Strategies")


def _cost(found: Comparison) -> str:
    base = next(one for one in found.strategies if one.name == found.against)
    rows = []
    for one in found.strategies:
        share = NOTHING
        if one.training_flops and base.training_flops:
            share = f"{one.training_flops / base.training_flops:.2f}"
        time = NOTHING if one.seconds is None else duration(one.seconds.value)
        speed = NOTHING if one.tokens_per_second is None else show(one.tokens_per_second.value, 0)
        rows.append([f"<b>{text_of(one.name)}</b>", count(one.active), count(one.total), share, time, speed])
    text = (
        "<p>Active parameters are without embeddings; FLOPs of training over those of"
        f" {text_of(found.against)}. The time of a run holds its evaluations, tokens per second are of training alone;"
        " both depend on what else the machine did.</p>"
    )
    head = ["Strategy", "Active", "Total", "FLOPs", "Time of a run", "Tokens/s"]
    return text + html_table(head, rows, "Cost")


def _verdict_cells(one: Verdict | None) -> list[str]:
    if one is None:
        return ["compared with", *[""] * 4]
    if one.low is None or one.bootstrap is None:
        return [_signed(one.difference), *[NOTHING] * 4]
    return [
        _signed(one.difference),
        f"{_signed(one.low)} to {_signed(one.high)}",
        f"{_signed(one.bootstrap[0])} to {_signed(one.bootstrap[1])}",
        "&lt; 0.001" if (one.adjusted_p or 0) < 0.001 else show(one.adjusted_p),
        show(one.detectable, 4),
    ]


def _signed(value: float | None) -> str:
    return NOTHING if value is None else f"{value:+.4f}".replace("-", "−")


def _half(mean: Mean) -> str:
    return NOTHING if mean.high is None else show(mean.high - mean.value, 4)


def _domains(found: Comparison) -> str:
    if not found.domains:
        return ""
    rows = []
    for one in found.strategies:
        cells = [show(one.domains[domain].value, 4) for domain in found.domains]
        for i, verdicts in enumerate(found.domains.values()):
            verdict = next((each for each in verdicts if each.name == one.name), None)
            cells[i] += {"better": " ↓", "worse": " ↑"}.get(verdict.word if verdict else "", "")
        rows.append([f"<b>{text_of(one.name)}</b>", *cells])
    text = (
        f"<p>↓ ↑: better, worse than {text_of(found.against)}, with p below 0.05 after Holm’s correction over the"
        " strategies of one domain.</p>"
    )
    return text + html_table(["Strategy", *map(text_of, found.domains)], rows, "Bits per byte by domain")


def domain_chart(found: Comparison) -> Chart:
    """Return the differences by domain with their intervals."""
    traces = []
    for one in found.strategies:
        told = [next((each for each in verdicts if each.name == one.name), None) for verdicts in found.domains.values()]
        if any(verdict is None for verdict in told):
            continue
        known = [verdict for verdict in told if verdict is not None]
        style = _colours(found)[one.name]
        half = [0.0 if verdict.high is None else verdict.high - verdict.difference for verdict in known]
        traces.append(
            _named(
                one.name,
                style,
                x=[escape(domain) for domain in found.domains],
                y=rounded([verdict.difference for verdict in known]),
                mode="markers",
                error_y={"type": "data", "array": rounded(half, 3), "color": style["colour"], "thickness": 1.2,
                         "width": 3},
                hovertemplate=f"<b>%{{y:+.4f}}</b> ± %{{error_y.array:.4f}}<br>{escape(one.name)}<extra></extra>",
            )
        )  # fmt: skip
    zero = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0, "y1": 0}
    layout = {
        "xaxis": axis("", type="category"),
        "yaxis": axis("bits per byte"),
        "shapes": [{**zero, "line": {"color": "--quiet", "width": 1}}],
        "scattermode": "group",
        "hovermode": "closest",
        "showlegend": True,
    }
    return Chart(f"Difference to {escape(found.against)} by domain", traces,
                 "Below the line: better. Bars: the 95 % interval of each alone.", layout, height=340)  # fmt: skip


def _balance(found: Comparison) -> str:
    levels = _levels(found)
    if not levels:
        return ""
    head = ["Strategy", *(f"{NAMES[what]}, {level}s" for what in BALANCE for level in levels), "Dead experts"]
    rows = []
    for one in found.strategies:
        means = [one.balance[what].get(level) for what in BALANCE for level in levels]
        cells = [NOTHING if mean is None else show(mean.value) for mean in [*means, one.dead_experts]]
        rows.append([f"<b>{text_of(one.name)}</b>", *cells])
    text = (
        "<p>Over the last 50 steps of training, means over layers and seeds; 0 is perfectly even. A dead expert gets"
        " under 1 % of a fair share; their number is that of a layer.</p>"
    )
    return text + html_table(head, rows, "Balance of the load")


def _levels(found: Comparison) -> list[str]:
    return [level for level in LEVELS if any(level in one.balance["cv"] for one in found.strategies)]


def balance_charts(found: Comparison) -> list[Chart]:
    """Return CV and MaxVio of each strategy, by level."""
    charts = []
    for what in BALANCE:
        traces = []
        for i, level in enumerate(_levels(found)):
            known = [(one, mean) for one in found.strategies if (mean := one.balance[what].get(level)) is not None]
            half = [0.0 if mean.high is None else mean.high - mean.value for _, mean in known]
            colour = style_of(i)["colour"]
            traces.append({
                "type": "bar",
                "name": f"{level}s",
                "x": [escape(one.name) for one, _ in known],
                "y": rounded([mean.value for _, mean in known]),
                "error_y": {"type": "data", "array": rounded(half, 3), "color": "--muted", "thickness": 1.2},
                "marker": {"color": colour},
                "hovertemplate": "<b>%{y:.3f}</b> ± %{error_y.array:.3f}<br>%{x}<extra></extra>",
            })  # fmt: skip
        layout = {"xaxis": axis("", type="category"), "yaxis": axis(NAMES[what], rangemode="tozero"),
                  "barmode": "group", "showlegend": len(traces) > 1, "hovermode": "closest"}  # fmt: skip
        charts.append(
            Chart(f"{NAMES[what]} of the load", traces, "Bars: 95 % interval over seeds.", layout, height=320)
        )
    return charts


def curve_chart(found: Comparison) -> Chart:
    """Return each strategy's mean validation loss over the tokens."""
    traces = []
    for one in found.strategies:
        curves = [dict(found.sweep.curves.get(str(row["run"]), [])) for row in one.rows.values()]
        at = sorted(set.intersection(*(set(curve) for curve in curves)))
        means = [float(np.mean([curve[tokens] for curve in curves])) for tokens in at]
        traces.append(
            _named(one.name, _colours(found)[one.name], x=rounded(at, 9), y=rounded(means), mode="lines+markers")
        )
    layout = {"xaxis": axis("training tokens", tickformat="~s"), "yaxis": axis("nats per token"), "showlegend": True,
              "hovermode": "closest"}  # fmt: skip
    caption = "Mean over seeds. The last point is on all held-out text, those before on a part of it."
    return Chart("Validation loss", traces, caption, layout, height=340, switches=(("loss", "yaxis"),))


def _tuning(found: Comparison) -> str:
    if found.tuning is None:
        rate = NOTHING if found.learning_rate is None else f"{found.learning_rate:g}"
        return f"<p>All runs have the learning rate {rate}; it was given.</p>"
    tuning = found.tuning
    own = [f"{one.name} {rate:g}" for one in found.strategies if (rate := tuning.best_of(one.name)) is not None]
    end = " It lies at an end of what was tried." if tuning.at_end else ""
    return (
        f"<p>All runs have the learning rate <b>{tuning.chosen:g}</b>, the best for all strategies together on seed"
        f" {tuning.seed}, which is not compared.{end} Alone, they were best at: {text_of(', '.join(own))}.</p>"
    )


def tuning_chart(found: Comparison) -> Chart:
    """Return the loss of every strategy against the learning rate; empty where it was given."""
    tuning = found.tuning
    rates = [] if tuning is None else sorted(tuning.losses)
    traces = []
    for one in found.strategies if tuning is not None else []:
        losses = [tuning.losses[rate].get(one.name) for rate in rates] if tuning else []
        traces.append(_named(one.name, _colours(found)[one.name], x=rounded(rates), y=rounded(losses),
                             mode="lines+markers"))  # fmt: skip
    ticks = [f"{rate:g}" for rate in rates]
    layout = {"xaxis": axis("learning rate", type="log", tickvals=rounded(rates), ticktext=ticks),
              "yaxis": axis("nats per token"), "showlegend": True, "hovermode": "closest"}  # fmt: skip
    return Chart("Loss against the learning rate", traces, "One run each.", layout, height=340)


def _left(found: Comparison) -> str:
    items = "".join(f"<li><b>{text_of(one.name)}</b> {text_of(one.reason)}</li>" for one in found.left)
    return f'<p>These are in no mean.</p><div class="alarms"><ul>{items}</ul></div>' if items else ""
