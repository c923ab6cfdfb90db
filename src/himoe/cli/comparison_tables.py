"""The tables of `himoe compare`."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from himoe.analysis.comparison import BALANCE, Comparison
from himoe.analysis.settings import Mean
from himoe.cli.amounts import count
from himoe.cli.tables import simple_table


def print_comparison(console: Console, found: Comparison) -> None:
    """Print the strategies, their domains, balance and cost, the verdicts, and how the rate was found."""
    tokens = max(row["tokens"] for one in found.strategies for row in one.rows.values())
    seeds = max(one.loss.n for one in found.strategies)
    _say(console, f"[bold]{len(found.strategies)} strategies[/bold], {seeds} seeds, {count(tokens)} tokens a run, "
                  f"{_rate(found)}\n")  # fmt: skip
    _print_losses(console, found)
    _print_domains(console, found)
    _print_balance(console, found)
    _print_cost(console, found)
    _say(console, f"[bold]Verdict[/bold], on the validation cross-entropy against {escape(found.against)}")
    for verdict in found.verdicts:
        _say(console, f"  {escape(verdict.sentence())}")
    if found.tuning is not None:
        own = [f"{one.name} {rate:g}" for one in found.strategies if (rate := found.tuning.best_of(one.name))]
        _say(console, f"\nalone, they were best at the learning rates: {escape(', '.join(own))}")
    for note in found.notes:
        _say(console, f"[yellow]note[/yellow] {escape(note)}")
    for one in found.left:
        _say(console, f"[yellow]left out[/yellow] {escape(one.name)}: {escape(one.reason)}")


def _rate(found: Comparison) -> str:
    rate = f"learning rate {found.learning_rate:g}"
    if found.tuning is None:
        return f"{rate}, as given"
    tried = ", ".join(f"{one:g}" for one in found.tuning.losses)
    end = "; the best is at an end of these" if found.tuning.at_end else ""
    return f"{rate}, the best of {tried} for all together on seed {found.tuning.seed}{end}"


def _print_losses(console: Console, found: Comparison) -> None:
    table = simple_table("strategy", ["loss", "±", "bits/byte", "against", "95 % interval"])
    for one in found.strategies:
        verdict = found.verdict_of(one.name)
        against = ["", ""] if verdict is None else [f"{verdict.difference:+.4f}", _interval(verdict.low, verdict.high)]
        loss = [f"{one.loss.value:.4f}", _half(one.loss), _mean(one.bits_per_byte, 4)]
        table.add_row(escape(one.name), *loss, *against)
    console.print(table)
    for line in (
        "loss: validation cross-entropy without auxiliary terms, nats per token. ±: half of Student's 95 % interval.",
        f"against: mean difference to {escape(found.against)} over seeds, paired, with the interval of it.",
    ):
        console.print(line, style="dim", highlight=False, soft_wrap=True)
    console.print()


def _print_cost(console: Console, found: Comparison) -> None:
    _say(console, "[bold]Cost[/bold]")
    table, base = simple_table("strategy", ["active", "total", "FLOPs", "time", "tokens/s"]), found.base
    for one in found.strategies:
        table.add_row(
            escape(one.name),
            "–" if one.active is None else count(one.active),
            "–" if one.total is None else count(one.total),
            _share(one.training_flops, base.training_flops),
            _share(one.seconds and one.seconds.value, base.seconds and base.seconds.value),
            "–" if one.tokens_per_second is None else f"{one.tokens_per_second.value:,.0f}",
        )
    console.print(table)
    text = (
        f"active: without embeddings. FLOPs, time: over those of {escape(found.against)}; time with its evaluations, "
        "tokens/s of training alone."
    )
    console.print(text, style="dim", highlight=False, soft_wrap=True)
    console.print()


def _print_domains(console: Console, found: Comparison) -> None:
    if not found.domains:
        return
    _say(console, "[bold]Bits per byte by domain[/bold]")
    table = simple_table("strategy", list(map(escape, found.domains)))
    sure = False
    for one in found.strategies:
        cells = []
        for domain in found.domains:
            verdict = found.verdict_of(one.name, domain)
            mark = {"better": " ↓", "worse": " ↑"}.get(verdict.word if verdict else "", "  ")
            sure = sure or mark != "  "
            cells.append(f"{_mean(one.domains.get(domain), 4)}{mark}")
        table.add_row(escape(one.name), *cells)
    console.print(table)
    if sure:
        console.print(
            f"↓ ↑: better, worse than {escape(found.against)} (p < 0.05 after Holm's correction within a domain).",
            style="dim",
            highlight=False,
        )
    console.print()


def _print_balance(console: Console, found: Comparison) -> None:
    levels = found.levels
    if not levels:
        return
    _say(console, "[bold]Balance of the load[/bold], last 50 steps, means over layers and seeds")
    table = simple_table("strategy", [f"{BALANCE[what]}, {level}s" for what in BALANCE for level in levels] + ["dead"])
    for one in found.strategies:
        cells = [_mean(one.balance[what].get(level), 3) for what in BALANCE for level in levels]
        table.add_row(escape(one.name), *cells, _mean(one.dead_experts, 1))
    console.print(table)
    console.print("dead: experts of a layer with under 1 % of a fair share.", style="dim", highlight=False)
    console.print()


def _half(mean: Mean) -> str:
    return "–" if mean.high is None else f"{mean.high - mean.value:.4f}"


def _mean(mean: Mean | None, digits: int) -> str:
    return "–" if mean is None else f"{mean.value:.{digits}f}"


def _interval(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{low:+.4f} to {high:+.4f}"


def _share(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}" if value and base else "–"


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)
