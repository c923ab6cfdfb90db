"""The tables of `himoe analyze` and `himoe recommend`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

from himoe.analysis.figures import fraction
from himoe.analysis.recommend import Best, Recommendation
from himoe.analysis.settings import Setting, equal_tokens, families, short_name
from himoe.analysis.study import Study, formula
from himoe.cli.amounts import count
from himoe.cli.tables import simple_table

SHOWN, LISTED = 16, 8


def print_study(console: Console, found: Study, page: str | None) -> None:
    """Print a sweep's settings apart by active size and tokens, its law, and the runs that were left out."""
    at = f", at {found.sweep.at}" if found.sweep.at else ""
    runs = sum(len(one.runs) for one in found.settings)
    _say(console, f"[bold]{escape(found.sweep.name)}[/bold]: {runs} runs in {len(found.settings)} settings{at}\n")
    known = {id(one) for family in families(found.settings) for one in family}
    groups = [same for family in families(found.settings) for same in equal_tokens(family)]
    if rest := [one for one in found.settings if id(one) not in known]:
        groups.append(rest)
    for group in groups:
        _print_settings(console, group)
    for line in (
        "±: half of Student's 95 % interval over the n seeds; one seed has none. paired: what is left of it",
        "without what a seed does to all settings beside it; settings are compared by that.",
    ):
        console.print(line, style="dim", highlight=False, soft_wrap=True)
    console.print()
    _print_law(console, found)
    if found.left:
        _say(
            console,
            f"[bold]Left out[/bold]: {len(found.left)} run{'s' * (len(found.left) > 1)}, in no mean and in no fit",
        )
        for one in found.left[:LISTED]:
            _say(console, f"  {escape(one.name or one.run)}: {escape(one.reason)}")
        if len(found.left) > LISTED:
            _say(console, f"  {len(found.left) - LISTED} more: see --json")
        console.print()
    if page:
        _say(console, f"report: {escape(page)}")


def _print_settings(console: Console, group: list[Setting]) -> None:
    first, ordered = group[0], sorted(group, key=lambda one: one.loss.value)
    size = f"{count(first.active)} active without embeddings and routers, " if first.active else ""
    _say(console, f"[bold]{size}{count(first.tokens)} tokens[/bold]")
    keys = [key for key in first.values if len({str(one.values.get(key)) for one in group}) > 1]
    columns = ["loss", "±", "paired", "n", "total", "s", "g", "CV", "MaxVio"]
    table = simple_table("setting", columns)
    table.columns[0].min_width = min(30, max(len(short_name({key: one.values[key] for key in keys})) for one in group))
    for one in ordered[:SHOWN]:
        half = ["–" if mean is None or mean.high is None else f"{mean.high - mean.value:.4f}"
                for mean in (one.loss, one.paired)]  # fmt: skip
        sizes = [one.fact(column) for column in ("total_parameters", "sparsity", "granularity")]
        means = ["–" if mean is None else f"{mean.value:.3f}" for mean in (one.cv, one.max_vio)]
        forms = zip(sizes, (count, lambda value: f"{value:g}", fraction), strict=True)
        cells = ["–" if value is None else form(value) for value, form in forms]
        name = short_name({key: one.values[key] for key in keys}) or one.name
        table.add_row(escape(name), f"{one.loss.value:.4f}", *half, str(one.loss.n), *cells, *means)
    console.print(table)
    if len(ordered) > SHOWN:
        console.print(f"{len(ordered) - SHOWN} more: see the report, or --json", style="dim", highlight=False)
    console.print()


def _print_law(console: Console, found: Study) -> None:
    if found.fitted is None:
        _say(console, f"[bold]No law[/bold]: {escape(found.no_law)}\n")
        return
    fitted = found.fitted
    law = fitted.ensemble.law
    _say(console, f"[bold]Law[/bold] of {len(fitted.settings)} settings, {law.spare} more than its parameters")
    _wrap(console, formula(fitted))
    for one in fitted.held_out:
        errors = f"{one.error:.2%}, {one.within:.2%} in the fit, {one.by_mean:.2%} by the others' mean loss"
        _say(console, f"error without {one.what}: {errors}")
    for name, reason in law.form.left_out.items():
        _say(console, f"not fitted: {name}, {reason}")
    console.print()


def print_recommendation(console: Console, found: Recommendation) -> None:
    """Print the best for a budget, its intervals, warnings, and what to run next."""
    size = f"{count(found.active)} active of {count(found.total)} parameters, {count(found.tokens)} tokens"
    _say(console, f"By {escape(found.source)}: {size}\n")
    table = simple_table("", ["best", "95 % interval", "measured"])
    for name, one, form in (
        ("granularity g = F/4D", found.granularity, lambda value: f"{value:.3g}"),
        ("sparsity s = E/K", found.sparsity, lambda value: f"{value:.3g}"),
        ("experts E = s·K", found.num_experts, lambda value: f"{value:.3g}"),
        ("experts of a token K", found.top_k, lambda value: f"{value:.3g}"),
        ("loss, mean over seeds", found.loss, lambda value: f"{value:.4f}"),
    ):
        if one is not None:
            table.add_row(name, form(one.value), f"{form(one.low)} – {form(one.high)}", _range(one))
    console.print(table)
    near = found.nearest
    hidden = f", moe.expert_dim = {near['expert_dim']:.0f}" if "expert_dim" in near else ""
    model = f"moe.num_experts = {near['num_experts']:.0f}, moe.top_k = {near['top_k']:.0f}{hidden}"
    _say(console, f"\nnearest model: {model} (g {fraction(near['granularity'])}, s {near['sparsity']:g}, "
                  f"loss {near['loss']:.4f})")  # fmt: skip
    for what, error in found.held_out.items():
        _say(console, f"the law's error without {what}: {error:.2%}")
    for line in found.warnings:
        _say(console, f"[yellow]warning[/yellow] {escape(line)}")
    if found.next:
        share = sum(one.explains for one in found.next)
        which = ", ".join(map(str, found.seeds))
        _say(console, f"\n[bold]To run next[/bold] with the seeds {which}; their outcomes would explain about "
                      f"{share:.0%} of the best's variance:")  # fmt: skip
        for one in found.next:
            new = ", beyond what was measured" if one.new else ""
            _say(console, f"  g {fraction(one.granularity)}, s {one.sparsity:g}: {one.explains:.0%}{new}")
        _say(console, "\nas a spec for himoe sweep, beside what your own sets:\n")
        print(found.spec())


def _range(one: Best) -> str:
    return "" if one.measured is None else f"{one.measured[0]:.3g} – {one.measured[1]:.3g}"


def print_published(console: Console, found: Mapping[str, Any]) -> None:
    """Print what is published about a budget, and by whom."""
    _say(console, f"[bold]From {escape(found['source'])}[/bold]\n")
    _say(console, f"active parameters     {count(found['active'])}, from {found['active_from']}")
    limit = ", ".join(found["limited_by"])
    _say(console, f"total over active     {found['total_over_active']:.3g}, limited by {limit}")
    _say(
        console,
        f"its own nearest size  {found['nearest_size']}: himoe plan --model {found['nearest_size']} --sparsity S",
    )
    _say(console, "granularity           no number is published for an active size; released models nearest in size:\n")
    table = simple_table("model", ["active", "total", "E", "K", "s", "g"])
    for one in found["released_models_near"]:
        sizes = [count(one["active"]), count(one["total"]), str(one["num_experts"]), str(one["top_k"])]
        table.add_row(one["name"], *sizes, f"{one['sparsity']:g}", fraction(one["granularity"]))
    console.print(table)
    for title, lines in (("Findings", found["findings"]), ("Caveats", found["caveats"])):
        _say(console, f"\n[bold]{title}[/bold]")
        for line in lines:
            _wrap(console, line)
    for line in found["warnings"]:
        _say(console, f"[yellow]warning[/yellow] {escape(line)}")
    _say(console, "\nA sweep of your own settles it: himoe sweep, then himoe recommend DIR.")


def _wrap(console: Console, text: str) -> None:
    for line in textwrap.wrap(text, min(console.width, 100) - 2, break_on_hyphens=False):
        _say(console, f"  {escape(line)}")


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)
