"""The charts that let a reader judge a law: its residuals, and its minima with the replicates' band."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from himoe.analysis.figures import fraction
from himoe.analysis.law import Law, Points
from himoe.analysis.optimum import Place, best, measured
from himoe.analysis.study import Fitted
from himoe.report.charts import Chart, axis, rounded

STEPS = 61


def residual_chart(fitted: Fitted) -> Chart:
    """Return measured less fitted loss in percent, beside what the fit without that setting would have said."""
    law = fitted.ensemble.law
    names = [escape(one.name) for one in fitted.settings]
    held = dict(fitted.held_out[0].predicted)
    without = [100 * (law.points.loss[i] - held[i]) for i in range(len(names))]
    x = rounded(np.exp(law.points.loss - law.residuals))
    common = {"type": "scatter", "mode": "markers", "x": x, "text": names}
    hover = "<b>%{y:+.2f} %</b><br>%{text}<extra></extra>"
    traces = [
        {**common, "name": "in the fit", "y": rounded(100 * law.residuals, 3), "hovertemplate": hover,
         "marker": {"color": "--series-1", "size": 8}},
        {**common, "name": "left out of it", "y": rounded(without, 3), "hovertemplate": hover,
         "marker": {"color": "--series-2", "size": 8, "symbol": "diamond-open", "line": {"width": 2}}},
    ]  # fmt: skip
    zero = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0, "y1": 0}
    layout = {
        "xaxis": axis("fitted loss, nats per token"),
        "yaxis": axis("measured less fitted, %"),
        "shapes": [{**zero, "line": {"color": "--quiet", "width": 1}}],
        "hovermode": "closest",
        "showlegend": True,
    }
    caption = "Open diamonds: the law fitted without that setting. A pattern here is something the law cannot say."
    return Chart("Residuals", traces, caption, layout, height=340)


def minimum_charts(fitted: Fitted) -> list[Chart]:
    """Return loss along granularity and along sparsity through the optimum of the largest active size."""
    law = fitted.ensemble.law
    n, d = float(law.points.n.max()), float(law.points.d.max())
    place = best(law, law.theta, n, d)
    at = {"n": n, "d": d, "s": float(place.s[0]), "g": float(place.g[0])}
    found = []
    for name, title, x_title, text in (
        ("g", "Along granularity", "granularity g = F/4D", fraction),
        ("s", "Along sparsity", "sparsity s = E/K", lambda value: f"{value:.3g}"),
    ):
        low, high = measured(law, name)
        if high - low > 1e-6:
            found.append(_along(fitted, name, at, (low, high), title, x_title, text))
    return found


def _along(
    fitted: Fitted, name: str, at: dict[str, float], ends: tuple[float, float], title: str, x_title: str, text: Any
) -> Chart:
    law, ensemble = fitted.ensemble.law, fitted.ensemble
    xs = np.linspace(*ends, STEPS)
    place = Place(*(xs if axis_name == name else np.full(STEPS, at[axis_name]) for axis_name in "nsgd"))
    middle = law.log_loss(place)
    others = law.log_loss(place, ensemble.theta)
    # Each replicate against its own mean: the band shows where the minimum lies, not how high the whole curve does.
    shape = others - others.mean(axis=1, keepdims=True) + middle.mean()
    low, high = np.exp(np.quantile(shape, [0.025, 0.975], axis=0))
    x, edge = rounded(np.exp(xs), 9), {"type": "scatter", "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip",
                                       "showlegend": False}  # fmt: skip
    traces = [
        {**edge, "x": x, "y": rounded(low)},
        {**edge, "x": x, "y": rounded(high), "fill": "tonexty", "fillcolor": "--band"},
        {"type": "scatter", "mode": "lines", "name": "the law", "x": x, "y": rounded(np.exp(middle)),
         "line": {"color": "--series-1", "width": 2}, "hovertemplate": "%{y:.4f}"},
        _moved(fitted, name, at),
    ]  # fmt: skip
    spread = getattr(best(law, ensemble.theta, at["n"], at["d"]), name)[:, 0]
    interval = np.exp(ensemble.interval(spread))
    strip = {"type": "rect", "yref": "paper", "y0": 0, "y1": 1, "x0": float(interval[0]), "x1": float(interval[1])}
    ticks = sorted(set(np.exp(np.round(getattr(law.points, name), 9)).tolist()))
    ticks = ticks[:: -(-len(ticks) // 8)]
    layout = {
        "xaxis": axis(x_title, type="log", tickvals=rounded(ticks, 9), ticktext=[text(one) for one in ticks]),
        "yaxis": axis("nats per token"),
        "shapes": [{**strip, "fillcolor": "--series-3", "opacity": 0.16, "line": {"width": 0}, "layer": "below"}],
        "hovermode": "closest",
        "showlegend": False,
    }
    caption = (
        f"Green: where the best lies in 95 % of the replicates, {text(float(interval[0]))} to "
        f"{text(float(interval[1]))}. Grey: their curves, moved to one height. Points: the settings, moved along the "
        "law to the active size, tokens and other axis of this curve."
    )
    return Chart(title, traces, caption, layout, height=340)


def _moved(fitted: Fitted, name: str, at: dict[str, float]) -> dict[str, Any]:
    """Return the settings as points: the law on the curve plus their residuals."""
    law: Law = fitted.ensemble.law
    points: Points = law.points
    same = {axis_name: np.full(len(points), at[axis_name]) for axis_name in "nsgd"}
    place = Place(**{**same, name: getattr(points, name)})
    y = np.exp(law.log_loss(place) + law.residuals)
    return {
        "type": "scatter", "mode": "markers", "x": rounded(np.exp(getattr(points, name)), 9), "y": rounded(y),
        "text": [escape(one.name) for one in fitted.settings], "marker": {"color": "--series-2", "size": 6,
                                                                          "opacity": 0.7},
        "hovertemplate": "<b>%{y:.4f}</b><br>%{text}<extra></extra>", "name": "settings",
    }  # fmt: skip
