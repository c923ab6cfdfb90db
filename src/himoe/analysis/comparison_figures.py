"""The charts of a comparison, as figures for plotly.js in the style of a run's report (`himoe.report`)."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from himoe.analysis.comparison import BALANCE, Comparison
from himoe.report.charts import Chart, axis, rounded, style_of

ROW, AROUND = 34, 110
"""Pixels of a strategy's row in a chart, and of what is around the rows."""


def _colours(found: Comparison) -> dict[str, dict[str, Any]]:
    """Return the style of every strategy, the same in all charts."""
    return {one.name: style_of(i) for i, one in enumerate(found.strategies)}


def difference_chart(found: Comparison) -> Chart:
    """Return each strategy's difference with its intervals, and the seeds behind it."""
    base = found.base
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


def domain_chart(found: Comparison) -> Chart:
    """Return the differences by domain with their intervals."""
    traces = []
    for one in found.strategies:
        known = [verdict for domain in found.domains if (verdict := found.verdict_of(one.name, domain)) is not None]
        if not known:
            continue
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


def balance_charts(found: Comparison) -> list[Chart]:
    """Return CV and MaxVio of each strategy, by level."""
    charts = []
    for what in BALANCE:
        traces = []
        for i, level in enumerate(found.levels):
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
        layout = {"xaxis": axis("", type="category"), "yaxis": axis(BALANCE[what], rangemode="tozero"),
                  "barmode": "group", "showlegend": len(traces) > 1, "hovermode": "closest"}  # fmt: skip
        charts.append(
            Chart(f"{BALANCE[what]} of the load", traces, "Bars: 95 % interval over seeds.", layout, height=320)
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
