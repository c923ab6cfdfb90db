"""A sweep as one self-contained HTML page, in the style of a run's report.

All text that a sweep brings along (names, errors, keys) is HTML-escaped here or in `figures.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from himoe.analysis import figures, law_figures
from himoe.analysis.law import TERMS
from himoe.analysis.optimum import best
from himoe.analysis.settings import Mean, Setting, equal_tokens, families, variants
from himoe.analysis.study import Fitted, Study, formula
from himoe.errors import DataError
from himoe.report.numbers import NOTHING, count, show, text_of
from himoe.report.page import Page, html_table, tile, write_document

SHOWN = 12
MAX_FAMILIES = 6
LISTED = 100
SYMBOLS = {"A": "A", "alpha": "α", "gamma": "γ", "lambda": "λ", "B": "B", "kappa": "κ", "delta": "δ", "beta": "β",
           "E": "E", "mu": "μ", "rho": "ρ"}  # fmt: skip
FORM = (
    "L = E + A·n<sup>−α</sup>·s<sup>−γ</sup>·g<sup>λ</sup>·exp(½δ·ln²s + ½κ·ln²g + μ·ln g·ln n + ρ·ln s·ln d)"
    " + B·d<sup>−β</sup>"
)


def write_page(found: Study, out: Path) -> Path:
    """Write the page of a sweep; the file appears complete or not at all.

    Raises:
        DataError: it cannot be written.
        MissingExtraError: plotly is not installed.
    """
    return write_document(build_page(found).document, out, extra="analysis", error=DataError)


def build_page(found: Study) -> Page:
    """Return the page with all its sections."""
    page = Page(found.sweep.name)
    page.parts.append(_headline(found))
    page.section("Settings", _settings(found))
    page.parts += _families(page, found)
    page.section("Other choices", page.grid(figures.choice_charts(found.settings, found.sweep.varied)))
    page.section("Balance", page.grid(figures.balance_charts(found.settings)))
    page.section("The law", _law(page, found))
    page.section("Learning", page.grid([figures.curve_chart(found.sweep, found.settings)]))
    page.section("Runs left out", _left(found))
    page.parts.append(
        "<footer>Made by himoe from the tables of the sweep alone. Drag over a chart to zoom in, double-click to zoom"
        " out; click a name in a legend to hide it.</footer>"
    )
    return page


def _families(page: Page, found: Study) -> list[str]:
    """Return a section for each active size and number of tokens, then one of equal totals."""
    groups = variants(found.settings)
    if not groups:
        return []
    first, *others = groups
    chosen = [one for one in found.settings if one.is_dense or one.variant == first]
    beside = _beside(first)
    note = f"Of the settings with {text_of(beside)}, the largest group of those that differ in shape and length alone."
    note = f"<p>{note}</p>" if others else ""
    parts, alike = [], [same for family in families(chosen)[::-1] for same in equal_tokens(family)]
    for same in [one for one in alike if len(one) > 2][:MAX_FAMILIES]:
        if charts := page.grid(figures.family_charts(same)):
            title = f"Equal active parameters: {_active(same)}, {count(same[0].tokens)} tokens"
            parts.append(f"<section><h2>{title}</h2>{note}{charts}</section>")
            note = ""
    totals = [figures.total_chart(same) for same in equal_tokens(chosen)[:2]]
    if charts := page.grid(totals):
        parts.append(f"<section><h2>Equal total parameters</h2>{charts}</section>")
    return parts


def _beside(variant: tuple[tuple[str, str], ...]) -> str:
    return ", ".join(f"{key} {value}" for key, value in variant if value != "None")


def _active(family: list[Setting]) -> str:
    smallest = min(float(one.fact("active_parameters") or 0) for one in family)
    return f"{count(smallest)} ({count(family[0].active)} without embeddings and routers)"


def _headline(found: Study) -> str:
    rows, settings = found.sweep.rows, found.settings
    used = sum(len(one.runs) for one in settings)
    seeds = sorted({one.loss.n for one in settings})
    each = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    at = f" Losses are those at {text_of(found.sweep.at)}." if found.sweep.at else ""
    lead = (
        f"<b>{used} runs</b> in {len(settings)} settings of {each} seed{'s' * (seeds[-1] > 1)};"
        f" varied: {text_of(', '.join(found.sweep.varied) or 'the seed alone')}.{at}"
    )
    note = ""
    if found.left:
        note = f'<p class="note">{len(found.left)} of {len(rows)} runs are in no mean; they are listed at the end.</p>'
    first = settings[0]
    tiles = [tile("Lowest loss", show(first.loss.value), f"{text_of(first.name)}; nats per token{_half(first.loss)}")]
    if first.bits_per_byte is not None:
        tiles.append(tile("Its bits per byte", show(first.bits_per_byte.value), "comparable between tokenizers"))
    tiles += _law_tiles(found.fitted) if found.fitted else []
    return (
        f'<header><p class="eyebrow">Sweep</p><h1>{text_of(found.sweep.name)}</h1>'
        f'<p class="lead">{lead}</p>{note}</header>'
        f'<dl class="tiles">{"".join(tiles)}</dl>'
    )


def _half(mean: Mean) -> str:
    return "" if mean.high is None else f", ± {mean.high - mean.value:.3f}"


def _law_tiles(fitted: Fitted) -> list[str]:
    law, theta = fitted.ensemble.law, fitted.ensemble.theta
    n, d = float(law.points.n.max()), float(law.points.d.max())
    at, spread = best(law, law.theta, n, d), best(law, theta, n, d)
    found = []
    for axis, label, form in (("g", "Best granularity", figures.fraction), ("s", "Best sparsity", _three)):
        if np.ptp(getattr(law.points, axis)) > 1e-6:
            low, high = np.exp(fitted.ensemble.interval(getattr(spread, axis)[:, 0]))
            value = float(np.exp(getattr(at, axis)[0]))
            found.append(tile(label, f"{value:.3g}", f"{form(low)} to {form(high)} at the largest active size"))
    error = fitted.held_out[0]
    found.append(tile("Held-out error", f"{100 * error.error:.2f} %", "of the law, on settings it had not seen"))
    return found


def _three(value: float) -> str:
    return f"{value:.3g}"


def _settings(found: Study) -> str:
    head = ["Setting", "Loss", "95 % interval", "Paired ±", "Seeds", "Bits per byte", "Total", "Active", "CV", "MaxVio"]
    rows = []
    for one in found.settings:
        interval = NOTHING if one.loss.low is None else f"{show(one.loss.low)} – {show(one.loss.high)}"
        sizes = [count(one.fact("total_parameters")), count(one.fact("active_parameters"))]
        means = [NOTHING if mean is None else show(mean.value) for mean in (one.bits_per_byte, one.cv, one.max_vio)]
        loss = f"<b>{show(one.loss.value)}</b>"
        paired = NOTHING if one.paired is None or one.paired.high is None else show(one.paired.high - one.paired.value)
        rows.append(
            [
                f'<span style="font-weight:400">{text_of(one.name)}</span>',
                loss,
                interval,
                paired,
                str(one.loss.n),
                means[0],
                *sizes,
                *means[1:],
            ]
        )
    text = (
        "<p>Means over seeds, the lowest loss first, with Student’s interval over the seeds; a single seed has none."
        " <b>Paired</b> is half the interval that is left when what a seed does to all settings of one size and length"
        " is taken out: settings that share their seeds are compared by that one.</p>"
    )
    table = html_table(head, rows[:SHOWN], "Settings")
    if len(rows) > SHOWN:
        rest = html_table(head, rows[SHOWN:], "Further settings")
        table += f"<details><summary>{len(rows) - SHOWN} more settings</summary>{rest}</details>"
    return text + table


def _law(page: Page, found: Study) -> str:
    if found.fitted is None:
        return f"<p>No law was fitted: {text_of(found.no_law)}.</p>"
    fitted, law = found.fitted, found.fitted.ensemble.law
    beside = _beside(fitted.variant)
    who = f"the {len(fitted.settings)} settings" + (f" with {text_of(beside)}" if beside else "")
    others = f" {fitted.others} settings that differ in more than shape are not in it." if fitted.others else ""
    text = (
        f"<p>Fitted to {who}.{others} <b>{FORM}</b>, with n the active parameters without embeddings and routers, s ="
        " E/K, g = F/4D and d the tokens, each over its geometric mean here. Settings are the points, seeds only make"
        f" them surer; {law.spare} more settings than parameters.</p>"
        f'<div class="command"><pre>{text_of(formula(fitted))}</pre></div>'
    )
    charts = page.grid(law_figures.minimum_charts(fitted)) + page.grid([law_figures.residual_chart(fitted)])
    return text + charts + _parameters(fitted) + _errors(fitted)


def _parameters(fitted: Fitted) -> str:
    law, rows = fitted.ensemble.law, []
    for name, (meaning, _) in TERMS.items():
        value, interval = law.value(name), fitted.ensemble.parameter(name)
        if name in law.form.terms and interval is not None:
            ends = f"{interval[0]:.3g} – {interval[1]:.3g}".replace("-", "−")
            rows.append([f"{SYMBOLS[name]}, {text_of(meaning)}", f"{float(value):.3g}".replace("-", "−"), ends])
    table = html_table(["Parameter", "Value", "95 % interval"], rows, "Parameters of the law")
    missing = "; ".join(f"{SYMBOLS[name]}, {text_of(reason)}" for name, reason in law.form.left_out.items())
    return table + (f"<p>Not fitted: {missing}.</p>" if missing else "")


def _errors(fitted: Fitted) -> str:
    rows = [
        [f"without {one.what}", *(f"{100 * value:.2f} %" for value in (one.error, one.within, one.by_mean))]
        for one in fitted.held_out
    ]
    head = ["Fitted", "Error on what was left out", "Error in the fit", "By the others’ mean loss"]
    return html_table(head, rows, "Errors of the law")


def _left(found: Study) -> str:
    items = [
        f"<li><b>{text_of(one.name or one.run)}</b> {text_of(one.reason)} ({text_of(one.run[:12])})</li>"
        for one in found.left
    ]
    if not items:
        return ""
    more = f"<p>{len(items) - LISTED} more are in the tables.</p>" if len(items) > LISTED else ""
    return (
        f'<p>These are in no mean and in no fit.</p><div class="alarms"><ul>{"".join(items[:LISTED])}</ul></div>{more}'
    )
