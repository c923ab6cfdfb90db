"""The report's charts as plain dict figures for plotly.js; what they have in common (fonts, axes) is in page.js.

Colours are names of the style sheet's variables (`--series-1`) or places on its ramp (`ramp:0.5`), which page.js looks
up: so one figure serves light, dark and print. Every name that a user can choose is HTML-escaped, since plotly.js reads
a few tags in text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from typing import Any

from himoe.report.read import RunFolder, number, table
from himoe.report.thinning import LayerHistory, LoadHistory, Series, series

NUM_COLOURS = 6
DASHES = ("solid", "dot", "dashdot")
MAX_MARKERS = 40
MAX_LEGEND = 12
LOAD_COLOURS = ("--load-none", "--load-less", "--load-fair", "--load-more", "--load-twice")
LOAD_SCALE = [[i / 4, colour] for i, colour in enumerate(LOAD_COLOURS)]


@dataclass
class Chart:
    """A figure with the words around it; `height` in pixels, `switches` the (label, axis) of its linear/log buttons."""

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


def line_trace(curve: Series, name: str, colour: str, **more: Any) -> dict[str, Any]:
    """Return a curve, as points where it has a single value."""
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
        "hovertemplate": "%{y:.4g}",
        **more,
    }


def band_traces(curve: Series, colour: str) -> list[dict[str, Any]]:
    """Return the area between a pooled curve's lowest and highest values."""
    if not curve.low:
        return []
    edge = {"type": "scatter", "mode": "lines", "x": rounded(curve.x, 9), "line": {"width": 0}}
    quiet = {"hoverinfo": "skip", "showlegend": False}
    low = {**edge, **quiet, "y": rounded(curve.low)}
    return [low, {**edge, **quiet, "y": rounded(curve.high), "fill": "tonexty", "fillcolor": colour}]


def style_of(index: int) -> dict[str, Any]:
    """Return the colour and dash of the index-th of several curves; not solid once the colours are used up."""
    dash = DASHES[index // NUM_COLOURS % len(DASHES)]
    return {"colour": f"--series-{index % NUM_COLOURS + 1}", "line": {"dash": dash}}


def _per_domain(run: RunFolder, key: str) -> list[dict[str, Any]]:
    """Return a curve per domain; evaluations on more text than the first one are diamonds of their own."""
    traces, diamonds = [], []
    for i, name in enumerate(run.domains):
        scores = [{"tokens": line.get("tokens"), **_score(line, name, key)} for line in run.evals]
        curve = [score for score in scores if score["size"] == scores[0]["size"]]
        more = [score for score in scores if score["size"] != scores[0]["size"]]
        style = {**style_of(i), "hovertemplate": "%{y:.4g} (at %{x:.3s})"}
        mode = "lines+markers" if len(curve) <= MAX_MARKERS else "lines"
        traces.append(line_trace(series(curve, "tokens", lambda score: score["value"]), name, **style, mode=mode))
        if more:
            every = series(more, "tokens", lambda score: score["value"])
            marker = {"symbol": "diamond-open", "size": 10, "line": {"width": 2}}
            style |= {"mode": "markers", "marker": marker, "showlegend": False}
            diamonds.append(line_trace(every, f"{name}, all text", **style))
    return traces + diamonds


def _score(line: dict[str, Any], name: str, key: str) -> dict[str, Any]:
    score = table(table(line.get("domains")).get(name))
    return {"value": score.get(key), "size": score.get("tokens")}


def loss_chart(run: RunFolder) -> Chart:
    """Cross-entropy over tokens: training, and held-out per domain."""
    training = series(run.train, "tokens", lambda line: line.get("loss"))
    caption = "Pure cross-entropy in nats per token, without auxiliary terms. Lower is better."
    if training.low:
        caption += " The band spans the lowest and highest value behind each point of the training curve."
    return Chart(
        "Cross-entropy",
        [
            *band_traces(training, "--band"),
            line_trace(training, "training", "--quiet", line={"width": 1.5}),
            *_per_domain(run, "loss"),
        ],
        caption,
        {
            "xaxis": axis("training tokens"),
            "yaxis": axis("nats per token"),
            "showlegend": len(run.domains) < MAX_LEGEND,
        },
        height=380,
        switches=(("loss", "yaxis"), ("tokens", "xaxis")),
    )


def bits_chart(run: RunFolder) -> Chart:
    """Held-out bits per byte over tokens, with each domain's byte-bigram model as a dashed line."""
    traces = _per_domain(run, "bits_per_byte")
    tokens = [number(line.get("tokens")) for line in [*run.train[:1], *run.evals[:1], *run.evals[-1:], *run.train[-1:]]]
    known = [value for value in tokens if value is not None]
    ends: list[float | None] = [min(known), max(known)] if len(set(known)) > 1 else []
    known_bigrams = [number(run.baselines.get(name, {}).get("bigram")) for name in run.domains]
    bigrams = known_bigrams if len(run.domains) <= NUM_COLOURS and ends and traces and any(known_bigrams) else []
    for i, (name, bigram) in enumerate(zip(run.domains, bigrams, strict=False)):
        colour = style_of(i)["colour"]
        line = line_trace(Series(ends, [bigram] * 2), f"{name}: bigram", colour, line={"dash": "dash", "width": 1.25})
        traces.append({**line, "mode": "lines", "hoverinfo": "skip", "hovertemplate": None, "showlegend": False})
    caption = "Bits needed per byte of text: comparable between tokenizers."
    return Chart(
        "Bits per byte on held-out text",
        traces,
        f"{caption} Dashed: the byte-bigram model of the same text." if bigrams else caption,
        {
            "xaxis": axis("training tokens"),
            "yaxis": axis("bits per byte"),
            "showlegend": len(run.domains) < MAX_LEGEND,
            **_best_mark(run),
        },
        height=380,
        switches=(("bits", "yaxis"), ("tokens", "xaxis")),
    )


def _best_mark(run: RunFolder) -> dict[str, Any]:
    """Return the layout that marks where the best evaluation was; none for a run that ended there."""
    step = number(table(run.outcome.get("best")).get("step"))
    tokens = next((number(line.get("tokens")) for line in run.evals if line["step"] == step), None)
    if tokens is None or step == number(run.outcome.get("step")):
        return {}
    place = {"xref": "x", "yref": "paper", "layer": "below"}
    mark = {**place, "type": "line", "x0": tokens, "x1": tokens, "y0": 0, "y1": 1}
    text = {"xref": "x", "yref": "paper", "x": tokens, "y": 1, "yanchor": "top", "xanchor": "right", "text": "best"}
    return {
        "shapes": [{**mark, "line": {"color": "--quiet", "width": 1, "dash": "dot"}}],
        "annotations": [{**text, "showarrow": False, "font": {"color": "--muted", "size": 11}}],
    }


def bucket_chart(records: list[dict[str, Any]], title: str, x_title: str, caption: str) -> Chart:
    """Bits per byte of the tokens in every range of `by_context` or `by_length`, with their share in the hover text."""
    total = sum(number(record.get("tokens")) or 0 for record in records)
    shares = [(number(record.get("tokens")) or 0) / total if total else 0 for record in records]
    bits = [number(record.get("bits_per_byte")) for record in records]
    trace = {
        "type": "bar",
        "x": [f"{record.get('to'):,}" for record in records],
        "y": rounded(bits),
        "text": ["" if value is None else f"{value:.2f}" for value in bits],
        "textposition": "auto",
        "textangle": 0,
        "customdata": rounded(shares, 3),
        "marker": {"color": "--series-1"},
        "hovertemplate": "%{y:.3f} bits per byte<br>%{customdata:.1%} of the tokens<extra></extra>",
    }
    layout = {"xaxis": axis(x_title, type="category"), "yaxis": axis("bits per byte", rangemode="tozero"),
              "showlegend": False, "bargap": 0.5, "hovermode": "closest"}  # fmt: skip
    return Chart(title, [trace] if len(records) > 1 else [], caption, layout)


def _level(y: float, **line: Any) -> dict[str, Any]:
    """Return a line across the whole chart at height y."""
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": {"color": "--quiet", **line}}


def heat_map(history: LayerHistory, loads: LoadHistory, groups: list[list[int]]) -> Chart:
    """Load of every expert of one layer over time, 1 = fair share, with the groups' borders and names."""
    experts = [expert for group in groups for expert in group]
    firsts = [sum(len(group) for group in groups[:i]) for i in range(len(groups))]
    yaxis = axis("expert", autorange="reversed", showgrid=False)
    borders: list[dict[str, Any]] = []
    if len(groups) > 1:
        shown = range(0, len(groups), -(-len(groups) // 8))
        middles = [firsts[g] + (len(groups[g]) - 1) / 2 for g in shown]
        yaxis |= {"title": None, "tickvals": middles, "ticktext": [_group_name(g, groups[g]) for g in shown]}
        borders = [_level(first - 0.5, width=1.5 if len(groups) <= 16 else 0.5) for first in firsts[1:]]
    trace = {
        "type": "heatmap",
        "x": rounded(loads.edges, 9),
        "z": [rounded((column[expert] for column in history.ratio), 3) for expert in experts],
        "zmin": 0,
        "zmax": 2,
        "colorscale": LOAD_SCALE,
        "showscale": False,
        "hoverongaps": False,
        "hovertemplate": "expert %{y}, around step %{x:.0f}<br><b>%{z:.2f}</b> × fair share<extra></extra>",
    }
    if experts != sorted(experts):
        trace["text"] = [[str(expert)] * len(history.ratio) for expert in experts]
        trace["hovertemplate"] = trace["hovertemplate"].replace("%{y}", "%{text}")
    layout = {"xaxis": axis("step", showgrid=False), "yaxis": yaxis, "shapes": borders, "hovermode": "closest"}
    return Chart(f"Layer {history.layer}", [trace], layout=layout, height=min(640, max(230, 90 + 13 * len(experts))))


def _group_name(index: int, experts: list[int]) -> str:
    """Return a group's number over those of its experts: a range where they are one, up to four of them otherwise."""
    if len(experts) > 1 and experts == list(range(experts[0], experts[0] + len(experts))):
        return f"group {index}<br>{experts[0]}–{experts[-1]}"
    return f"group {index}<br>{', '.join(map(str, experts[:4]))}{' …' * (len(experts) > 4)}"


def layer_chart(loads: LoadHistory, statistic: str, title: str, caption: str, **more: Any) -> Chart:
    """One statistic of every layer over steps; layers take their colour from the ramp, first to last."""
    count = len(loads.layers)
    many = count > MAX_LEGEND
    traces = []
    for i, layer in enumerate(loads.layers):
        name, colour = f"layer {layer.layer}", f"ramp:{i / max(1, count - 1):.3f}"
        hover = {"hovertemplate": f"{name}, step %{{x}}: %{{y:.4g}}<extra></extra>"} if many else {}
        traces.append(line_trace(Series(list(loads.ends), layer.statistics[statistic]), name, colour, **hover))
    if many:
        caption += " Colours run from the first layer (violet) to the last (yellow)."
    layout = {"xaxis": axis("step"), "showlegend": not many, "hovermode": "closest" if many else "x unified"}
    return Chart(title, traces, caption, layout | more.pop("layout", {}), **more)


def bounded(low: float, low_text: str, high_text: str) -> dict[str, Any]:
    """Return the layout for a statistic in [low, 1], with both bounds drawn and named."""
    pad = 0.09 * (1 - low) or 0.1
    text = {"xref": "paper", "x": 1, "xanchor": "right", "showarrow": False, "font": {"color": "--muted", "size": 11}}
    return {
        "yaxis": axis("", range=[low - pad, 1 + pad]),
        "shapes": [_level(y, width=1, dash="dot") for y in (low, 1.0)],
        "annotations": [
            {**text, "y": 1, "yanchor": "bottom", "text": high_text},
            {**text, "y": low, "yanchor": "top", "text": low_text},
        ],
    }
