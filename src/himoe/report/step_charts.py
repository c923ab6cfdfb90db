"""The small charts of the optimisation: what a training line tells beside the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from himoe.report.charts import Chart, axis, band_traces, line_trace, style_of
from himoe.report.read import RunFolder, table
from himoe.report.thinning import series

NOISE_TEXT = (
    "The batch, in sequences, whose gradient is half signal and half noise. Training with far smaller batches gains"
    " almost in proportion when they grow; with far larger ones it gains little. The dotted line is this run’s batch."
)


def step_charts(run: RunFolder) -> list[Chart]:
    """Return the charts over steps; those without values are empty."""
    return [
        auxiliary_chart(run),
        _single(run, "Learning rate", "lr"),
        _single(run, "Gradient norm", "grad_norm", "Of all parameters together, before clipping."),
        _by_role(run, "grad", "Gradient norm by role", "Of one step, before clipping."),
        _by_role(run, "weight", "Weight norm by role"),
        _noise_chart(run),
        _single(run, "Tokens per second", "tokens_per_second", exponentformat="SI"),
        _single(run, "Waiting for data", "data_wait", "Share of the step time.", tickformat=".1%"),
    ]


def auxiliary_chart(run: RunFolder) -> Chart:
    """Every auxiliary loss over steps."""
    curves = _named_curves(run, "aux", lambda value: value)
    caption = "Weighted and summed over layers, as added to the training loss; a negative one rewards."
    return Chart("Auxiliary losses", curves, caption, {"xaxis": axis("step"), "showlegend": True})


def _by_role(run: RunFolder, which: str, title: str, caption: str = "") -> Chart:
    curves = _named_curves(run, "norms", lambda value: table(value).get(which))
    for curve in curves:
        curve["name"] = curve["name"].replace("_", " ")
    values = [value for curve in curves for value in curve["y"] if value]
    wide = bool(values) and max(values) > 1000 * min(values)  # ticks at 1, 2 and 5, or at powers of ten only
    yaxis = {"type": "log", "tickformat": "~g", "dtick": 1 if wide else "D2"}
    return Chart(title, curves, caption, {"xaxis": axis("step"), "yaxis": yaxis, "showlegend": True})


def _noise_chart(run: RunFolder) -> Chart:
    chart = _single(run, "Gradient noise scale", "noise_scale", NOISE_TEXT)
    batch = table(run.config.get("train")).get("batch_size")
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": batch, "y1": batch}
    chart.layout["shapes"] = [{**line, "line": {"color": "--quiet", "width": 1, "dash": "dot"}}] if batch else []
    return chart


def _named_curves(run: RunFolder, key: str, read: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """Return a curve for every name in the table `key` of the training lines."""
    traces = []
    for i, name in enumerate(dict.fromkeys(name for line in run.train for name in table(line.get(key)))):
        curve = series(run.train, "step", lambda line, n=name: read(table(line.get(key)).get(n)))
        style = style_of(i)
        traces.append(line_trace(curve, name, style["colour"], line=style["line"]))
    return traces


def _single(run: RunFolder, title: str, key: str, caption: str = "", **yaxis: Any) -> Chart:
    """Return one number of the training lines over steps."""
    curve = series(run.train, "step", lambda line: line.get(key))
    traces = [*band_traces(curve, "--band"), line_trace(curve, title, "--series-1", line={"width": 1.5})]
    layout = {"xaxis": axis("step"), "yaxis": {"rangemode": "tozero", **yaxis}, "showlegend": False}
    return Chart(title, traces, caption, layout)
