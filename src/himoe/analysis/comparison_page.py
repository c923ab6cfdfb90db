"""A comparison as one self-contained HTML page, in the style of a run's report."""

from __future__ import annotations

from pathlib import Path

from himoe.analysis import comparison_figures as figures
from himoe.analysis.comparison import BALANCE, Comparison
from himoe.analysis.paired import Verdict
from himoe.analysis.settings import Mean
from himoe.errors import DataError
from himoe.report.numbers import NOTHING, count, duration, show, text_of
from himoe.report.page import Page, html_table, tile, write_document


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
    page.section("Verdict", _verdict(found) + page.grid([figures.difference_chart(found), figures.seed_chart(found)]))
    page.section("Strategies", _strategies(found))
    page.section("Cost", _cost(found))
    page.section("Bits per byte by domain", _domains(found) + page.grid([figures.domain_chart(found)]))
    page.section("Balance of the load", _balance(found) + page.grid(figures.balance_charts(found)))
    page.section("Learning", page.grid([figures.curve_chart(found)]))
    page.section("Learning rate", _tuning(found) + page.grid([figures.tuning_chart(found)]))
    page.section("Runs left out", _left(found))
    page.parts.append(
        "<footer>Made by himoe from the table of the runs alone. Drag over a chart to zoom in, double-click to zoom"
        " out; click a name in a legend to hide it.</footer>"
    )
    return page


def _headline(found: Comparison) -> str:
    strategies = found.strategies
    seeds = max(one.loss.n for one in strategies)
    tokens = max(row["tokens"] for one in strategies for row in one.rows.values())
    names = ", ".join(one.name for one in strategies)
    notes = "".join(f'<p class="note">{text_of(note)}.</p>' for note in found.notes)
    words = [one.word for one in found.verdicts]
    tiles = [
        tile("Lowest loss", text_of(strategies[0].name), f"{show(strategies[0].loss.value, 4)} nats per token"),
        tile(f"Better than {text_of(found.against)}", str(words.count("better")), f"of {len(words)} strategies"),
        tile(f"Worse than {text_of(found.against)}", str(words.count("worse")),
              f"no difference seen: {words.count('no difference seen')}"),
        tile("Tokens of a run", count(tokens), f"{seeds} seeds of each strategy"),
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
    base, rows = found.base, []
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
        means = [one.domains.get(domain) for domain in found.domains]
        cells = [NOTHING if mean is None else show(mean.value, 4) for mean in means]
        for i, domain in enumerate(found.domains):
            verdict = found.verdict_of(one.name, domain)
            cells[i] += {"better": " ↓", "worse": " ↑"}.get(verdict.word if verdict else "", "")
        rows.append([f"<b>{text_of(one.name)}</b>", *cells])
    text = (
        f"<p>↓ ↑: better, worse than {text_of(found.against)}, with p below 0.05 after Holm’s correction over the"
        " strategies of one domain.</p>"
    )
    return text + html_table(["Strategy", *map(text_of, found.domains)], rows, "Bits per byte by domain")


def _balance(found: Comparison) -> str:
    levels = found.levels
    if not levels:
        return ""
    head = ["Strategy", *(f"{BALANCE[what]}, {level}s" for what in BALANCE for level in levels), "Dead experts"]
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


def _tuning(found: Comparison) -> str:
    if found.tuning is None:
        return f"<p>All runs have the learning rate {found.learning_rate:g}; it was given.</p>"
    tuning = found.tuning
    own = [f"{one.name} {rate:g}" for one in found.strategies if (rate := tuning.best_of(one.name)) is not None]
    end = " It lies at an end of what was tried." if tuning.at_end else ""
    return (
        f"<p>All runs have the learning rate <b>{tuning.chosen:g}</b>, the best for all strategies together on seed"
        f" {tuning.seed}, which is not compared.{end} Alone, they were best at: {text_of(', '.join(own))}.</p>"
    )


def _left(found: Comparison) -> str:
    items = "".join(f"<li><b>{text_of(one.name)}</b> {text_of(one.reason)}</li>" for one in found.left)
    return f'<p>These are in no mean.</p><div class="alarms"><ul>{items}</ul></div>' if items else ""
