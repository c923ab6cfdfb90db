"""The charts of a sweep's report, as figures for plotly.js in the style of a run's report (`himoe.report`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np

from himoe.analysis.runs import Sweep, number
from himoe.analysis.settings import Setting, families, is_shape
from himoe.report.charts import Chart, axis, rounded, style_of
from himoe.report.numbers import count

MAX_LINES = 18
"""Lines of a chart, as many as colours and dashes tell apart."""
MAX_CURVES = 60
ALIKE = 1.1
"""Totals that differ by less than this factor are equal: whole experts do not divide every total."""


def fraction(value: float) -> str:
    """Return 1/4 for 0.25.

    >>> fraction(0.25), fraction(1), fraction(1 / 6), fraction(0.3)
    ('1/4', '1', '1/6', '0.3')
    """
    inverse = 1 / value
    return f"1/{inverse:.0f}" if inverse > 1.01 and abs(inverse - round(inverse)) < 1e-6 else f"{value:.3g}"


def _log_axis(title: str, values: Sequence[float], text: Callable[[float], str]) -> dict[str, Any]:
    """Return a logarithmic axis with a tick at each value, at some of many."""
    ticks = sorted(set(values))
    while len(ticks) > 8:
        ticks = ticks[::2]
    return axis(title, type="log", tickvals=rounded(ticks, 9), ticktext=[text(one) for one in ticks])


def _line(
    some: Sequence[Setting], x: Callable[[Setting], float], name: str, index: int, value: str = "loss"
) -> dict[str, Any]:
    """Return one line with the interval of each mean, none where there is a single seed."""
    style, points = style_of(index), sorted(some, key=x)
    means = [getattr(one, value) for one in points]
    bars = [one.paired if value == "loss" and one.paired else mean for one, mean in zip(points, means, strict=True)]
    half = [0.0 if mean.high is None else mean.high - mean.value for mean in bars]
    notes = [f"{escape(one.name)}<br>{one.loss.n} seed{'s' * (one.loss.n > 1)}" for one in points]
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(points) > 1 else "markers",
        "name": escape(name, quote=False),
        "x": rounded([x(one) for one in points], 9),
        "y": rounded([mean.value for mean in means]),
        "text": notes,
        "error_y": {"type": "data", "array": rounded(half, 3), "color": style["colour"], "thickness": 1.2, "width": 3,
                    "visible": any(half)},
        "line": {"color": style["colour"], "width": 2, **style["line"]},
        "marker": {"color": style["colour"], "size": 7},
        "hovertemplate": "<b>%{y:.4f}</b> ± %{error_y.array:.4f}<br>%{text}<extra></extra>",
    }  # fmt: skip


def _against(
    title: str, some: Sequence[Setting], x: str, lines: str, xaxis: Callable[[list[float]], dict[str, Any]],
    name: Callable[[float], str], caption: str, value: str = "loss",
) -> Chart:  # fmt: skip
    """Return loss, or CV, against one column, a line for each value of another; empty where the first is one value."""
    known = [one for one in some if not one.is_dense and number(one.fact(x)) and number(one.fact(lines))]
    known = [one for one in known if getattr(one, value) is not None]
    values = sorted({float(one.fact(lines)) for one in known}, reverse=lines == "granularity")
    found = []
    for i, level in enumerate(values[:MAX_LINES]):
        of = [one for one in known if float(one.fact(lines)) == level]
        found.append(_line(of, lambda one: float(one.fact(x)), name(level), i, value))
    xs = [float(one.fact(x)) for one in known]
    if len(set(xs)) < 2:
        found = []
    dense = [one for one in some if one.is_dense]
    unit = axis("nats per token") if value == "loss" else axis("CV", rangemode="tozero")
    layout = {"xaxis": xaxis(xs), "yaxis": unit, "showlegend": True, "hovermode": "closest"}
    if found and dense and value == "loss":
        layout |= _level(min(one.loss.value for one in dense), "dense")
    if len(values) > MAX_LINES:
        caption += f" {MAX_LINES} of {len(values)} lines are shown."
    return Chart(title, found, caption, layout, height=340)


def _level(y: float, text: str) -> dict[str, Any]:
    line = {"color": "--quiet", "width": 1.5, "dash": "dash"}
    mark = {"xref": "paper", "x": 0, "xanchor": "left", "y": y, "yanchor": "bottom", "showarrow": False, "text": text}
    return {
        "shapes": [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line}],
        "annotations": [{**mark, "font": {"color": "--muted", "size": 11}}],
    }


def family_charts(family: Sequence[Setting]) -> list[Chart]:
    """Return the charts of settings with equal active parameters: against granularity, experts and total."""

    def by_granularity(xs: list[float]) -> dict[str, Any]:
        return _log_axis("granularity g = F/4D, finer to the left", xs, fraction)

    def by_experts(xs: list[float]) -> dict[str, Any]:
        return _log_axis("experts E", xs, lambda value: f"{value:.0f}")

    def by_total(_: list[float]) -> dict[str, Any]:
        return axis("total parameters", type="log", dtick="D2", tickformat="~s")

    def sparse(value: float) -> str:
        return f"s = {value:g}"

    def fine(value: float) -> str:
        return f"g = {fraction(value)}"

    lines = (
        "A line for each sparsity s = E/K. Bars: the 95 % interval for comparing settings, without what a seed"
        " does to all of them."
    )
    balance = _against("CV of load against expert count", family, "num_experts", "granularity", by_experts, fine,
                       "Means over seeds; 0 is perfectly even load.", value="cv")  # fmt: skip
    return [
        _against("Loss against granularity", family, "granularity", "sparsity", by_granularity, sparse, lines),
        _against("Loss against expert count", family, "num_experts", "granularity", by_experts, fine,
                 "A line for each granularity g."),
        _against("Loss against total parameters", family, "total_parameters", "granularity", by_total, fine,
                 "The same models by all the parameters they hold, embeddings included."),
        balance,
    ]  # fmt: skip


def total_chart(settings: Sequence[Setting]) -> Chart:
    """Return loss against active parameters, a line for each total that several settings of unlike active size have."""
    known = [(number(one.fact("total_parameters")), number(one.fact("active_parameters")), one) for one in settings]
    known = sorted(((t, a, one) for t, a, one in known if t and a), key=lambda item: item[0])
    groups: list[list[tuple[float, float, Setting]]] = []
    for item in known:
        if groups and item[0] <= ALIKE * groups[-1][0][0]:
            groups[-1].append(item)
        else:
            groups.append([item])
    found = []
    for group in groups:
        actives = [a for _, a, _ in group]
        if max(actives) < 1.15 * min(actives):
            continue
        best: dict[float, Setting] = {}
        for _, active, one in group:  # the best of each active size: the envelope
            key = next((known for known in best if abs(known / active - 1) < 0.1), active)
            best[key] = min(best.get(key, one), one, key=lambda each: each.loss.value)
        line = list(best.items())
        sizes = {id(one): active for active, one in line}
        name = f"{count(float(np.median([t for t, _, _ in group])))} in total"
        found.append(_line([one for _, one in line], lambda one, sizes=sizes: sizes[id(one)], name, len(found)))
    layout = {"xaxis": axis("active parameters", type="log", dtick="D2", tickformat="~s"),
              "yaxis": axis("nats per token"), "showlegend": True, "hovermode": "closest"}  # fmt: skip
    caption = "Equal total parameters, within a tenth; at each active size the best setting there is."
    title = f"Loss against active parameters, {count(settings[0].tokens)} tokens"
    return Chart(title, found[:MAX_LINES], caption, layout, height=340)


def choice_charts(settings: Sequence[Setting], varied: Sequence[str]) -> list[Chart]:
    """Return the charts of what is no shape: heat maps of pairs of numbers, and loss by each other key's values."""
    maps = heat_maps(settings, varied)
    shown = {key for chart in maps for key in chart.title.split(" × ")}
    found = []
    for key in varied:
        if is_shape(key) or escape(key) in shown:
            continue
        known = [one for one in settings if one.values.get(key) is not None]
        values = list(dict.fromkeys(str(one.values[key]) for one in known))
        if len(values) < 2 or len(values) > MAX_LINES:
            continue
        trace = {
            "type": "scatter",
            "mode": "markers",
            "x": [escape(str(one.values[key])[:40]) for one in known],
            "y": rounded([one.loss.value for one in known]),
            "text": [escape(one.name) for one in known],
            "marker": {"color": "--series-1", "size": 8, "opacity": 0.7},
            "hovertemplate": "<b>%{y:.4f}</b><br>%{text}<extra></extra>",
        }
        layout = {"xaxis": axis(escape(key), type="category"), "yaxis": axis("nats per token"), "showlegend": False,
                  "hovermode": "closest"}  # fmt: skip
        found.append(Chart(escape(key), [trace], "A point for each setting, whatever else varies.", layout, height=320))
    return [*maps, *found]


def heat_maps(settings: Sequence[Setting], varied: Sequence[str]) -> list[Chart]:
    """Return loss over each pair of numeric keys that are no shape and form a grid, such as α and u."""
    keys = [key for key in varied if not is_shape(key) and _levels(settings, key)]
    found = []
    for i, across in enumerate(keys):
        for down in keys[i + 1 :]:
            xs, ys = _levels(settings, across), _levels(settings, down)
            cells = [[_cell(settings, across, x, down, y) for x in xs] for y in ys]
            if sum(value is not None for row in cells for value in row) < 4:
                continue
            trace = {
                "type": "heatmap",
                "x": [f"{x:g}" for x in xs],
                "y": [f"{y:g}" for y in ys],
                "z": [rounded(row) for row in cells],
                "text": [["" if value is None else f"{value:.3f}" for value in row] for row in cells],
                "texttemplate": "%{text}",
                "colorscale": [[0, "--load-less"], [0.5, "--load-fair"], [1, "--load-more"]],
                "showscale": False,
                "hovertemplate": "<b>%{z:.4f}</b> nats<extra></extra>",
            }
            layout = {"xaxis": axis(escape(across), type="category"), "yaxis": axis(escape(down), type="category"),
                      "hovermode": "closest"}  # fmt: skip
            caption = "Mean loss over all settings of a cell, whatever else varies. Blue is lower."
            found.append(Chart(f"{escape(down)} × {escape(across)}", [trace], caption, layout, height=320))
    return found


def _levels(settings: Sequence[Setting], key: str) -> list[float]:
    """Return the numbers that a key takes, none where it takes fewer than two or is no number."""
    values = [one.values.get(key) for one in settings if one.values.get(key) is not None]
    numbers = {found for value in values if (found := number(value)) is not None}
    return sorted(numbers) if len(numbers) > 1 and all(number(value) is not None for value in values) else []


def _cell(settings: Sequence[Setting], across: str, x: float, down: str, y: float) -> float | None:
    found = [one.loss.value for one in settings
             if number(one.values.get(across)) == x and number(one.values.get(down)) == y]  # fmt: skip
    return float(np.mean(found)) if found else None


def balance_charts(settings: Sequence[Setting]) -> list[Chart]:
    """Return loss against CV and MaxVio of the experts' load."""
    names = {"cv": "CV of load", "max_vio": "MaxVio"}
    found = []
    for column, title in names.items():
        traces = []
        for i, family in enumerate(families(settings)[:MAX_LINES]):
            known = [(getattr(one, column), one) for one in family if getattr(one, column) is not None]
            traces.append({
                "type": "scatter",
                "mode": "markers",
                "name": f"{count(family[0].active)} active",
                "x": rounded([mean.value for mean, _ in known]),
                "y": rounded([one.loss.value for _, one in known]),
                "text": [escape(one.name) for _, one in known],
                "marker": {"color": style_of(i)["colour"], "size": 8, "opacity": 0.75},
                "hovertemplate": "<b>%{y:.4f}</b> nats, %{x:.3f}<br>%{text}<extra></extra>",
            })  # fmt: skip
        layout = {"xaxis": axis(title, rangemode="tozero"), "yaxis": axis("nats per token"),
                  "showlegend": len(traces) > 1, "hovermode": "closest"}  # fmt: skip
        caption = "A point for each setting; 0 is perfectly even load."
        found.append(Chart(f"Loss beside {title}", traces, caption, layout, height=320))
    return found


def curve_chart(sweep: Sweep, settings: Sequence[Setting]) -> Chart:
    """Return the mean learning curve of each setting, coloured from the best to the worst at the end."""
    known = [one for one in settings if any(sweep.curves.get(str(row["run"])) for row in one.runs)]
    step = max(1, -(-len(known) // MAX_CURVES))
    shown = known[::step]
    traces = []
    for i, one in enumerate(shown):
        curves = [dict(sweep.curves.get(str(row["run"]), [])) for row in one.runs]
        at = sorted(set.intersection(*(set(curve) for curve in curves)))
        means = [float(np.mean([curve[tokens] for curve in curves])) for tokens in at]
        traces.append({
            "type": "scatter", "mode": "lines", "name": escape(one.name), "x": rounded(at, 9), "y": rounded(means),
            "line": {"color": f"ramp:{i / max(1, len(shown) - 1):.3f}", "width": 1.5},
            "hovertemplate": f"<b>%{{y:.4f}}</b> at %{{x:.3s}} tokens<br>{escape(one.name)}<extra></extra>",
        })  # fmt: skip
    layout = {"xaxis": axis("training tokens", type="log", dtick="D2", tickformat="~s"),
              "yaxis": axis("nats per token"), "showlegend": False, "hovermode": "closest"}  # fmt: skip
    caption = (
        "Mean over seeds of the validation loss. Colours run from the best setting (violet) to the worst (yellow)."
    )
    caption += f" {len(shown)} of {len(known)} settings are shown." if step > 1 else ""
    return Chart("Learning curves", traces, caption, layout, height=380,
                 switches=(("loss", "yaxis"),))  # fmt: skip
