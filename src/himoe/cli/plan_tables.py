"""The tables of `himoe plan`: one model, two side by side, and the shapes within a budget."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from himoe.cli.amounts import count, size, work
from himoe.cli.tables import simple_table

ROLES = {
    "input_embedding": "input embedding",
    "head": "head",
    "attention": "attention",
    "attention_scores": "attention scores",
    "router": "router",
    "experts": "experts",
    "shared_expert": "shared expert",
    "dense": "dense layers",
    "norms": "norms",
}
SHOWN = 24
"""Rows of a Pareto set that are printed; `--json` has all."""


def print_plan(console: Console, plan: Mapping[str, Any]) -> None:
    """Print one model: sizes, parameters and FLOPs by role, training, memory, routing, warnings."""
    _print(console, f"[bold]{escape(plan['name'])}[/bold]: {_sizes(plan['shape'])}")
    if plan["source"]:
        console.print(escape(plan["source"]), style="dim", highlight=False, soft_wrap=True)
    console.print()
    _print_roles(console, plan)
    for title, rows in (
        ("Training", _training(plan)),
        ("Memory of a rank", _memory(plan)),
        ("Experts", _routing(plan)),
    ):
        if rows:
            _print(console, f"\n[bold]{title}[/bold]")
        for name, text in rows:
            _print(console, f"{name:<24}{escape(text)}")
    if plan["warnings"]:
        console.print()
    for line in plan["warnings"]:
        _print(console, f"[yellow]warning[/yellow] {escape(line)}")


def print_comparison(console: Console, first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Print two models side by side, and how many times as large the second is."""
    for plan in (first, second):
        _print(console, f"[bold]{escape(plan['name'])}[/bold]: {_sizes(plan['shape'])}")
    console.print()
    table = simple_table("", [escape(first["name"]), escape(second["name"]), "ratio"])
    for name, form, place in COMPARED:
        values = [_at(plan, place) for plan in (first, second)]
        if values == [None, None]:
            continue
        a, b = values
        ratio = f"{b / a:.3g}" if a and b is not None else ""
        table.add_row(name, *("–" if value is None else form(value) for value in values), ratio)
    console.print(table)
    for plan in (first, second):
        for line in plan["warnings"]:
            _print(console, f"[yellow]warning[/yellow] {escape(plan['name'])}: {escape(line)}")


def print_search(console: Console, found: Mapping[str, Any]) -> None:
    """Print the shapes of a Pareto set, evenly thinned where there are many, and how to train the first one."""
    rows: Sequence[Mapping[str, Any]] = found["pareto"]
    shown = rows
    if len(rows) > SHOWN:
        shown = [rows[round(i * (len(rows) - 1) / (SHOWN - 1))] for i in range(SHOWN)]
    table = simple_table("total", ["active", "memory", "FLOPs", "D", "L", "E", "K", "g", "sets", "tokens"])
    for row in shown:
        keys = row["set"]
        numbers = [str(keys[key]) for key in ("model.dim", "model.num_layers", "moe.num_experts", "moe.top_k")]
        table.add_row(
            count(row["total"]),
            count(row["active"]),
            size(row["memory"]),
            count(row["flops_per_token"]),
            *numbers,
            _fraction(row["granularity"]),
            f"2^{row['log2_combinations']:.0f}",
            count(row["tokens_per_expert_per_step"]),
        )
    console.print(table)
    for line in (
        "FLOPs: of a token, forward and backward. g: F/4D. sets: of experts that a token",
        "can have. tokens: of an expert in a step.",
    ):
        console.print(line, style="dim", highlight=False)
    console.print()
    _print(
        console, f"{len(shown)} of {len(rows)} shapes that no other one beats in parameters, sets, memory and FLOPs at"
    )
    _print(console, "once; --json has all of them, each with its keys. The first one:")
    _print(console, " ".join(f"--set {key}={value}" for key, value in rows[0]["set"].items()))


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def _sizes(shape: Mapping[str, Any]) -> str:
    text = f"{shape['num_layers']} layers of width {shape['dim']:,}, {shape['vocab_size']:,} tokens"
    if not shape["moe_layers"]:
        return f"{text}, no experts"
    groups = f" in {shape['num_groups']} groups" if shape["num_groups"] > 1 else ""
    layers = "" if shape["moe_layers"] == shape["num_layers"] else f", in {shape['moe_layers']} of the layers"
    return f"{text}, {shape['top_k']} of {shape['num_experts']:,} experts{groups}{layers}"


def _print_roles(console: Console, plan: Mapping[str, Any]) -> None:
    """Print parameters and FLOPs by role, and what all of them come to."""
    counts, cost = plan["parameters"], plan["flops_per_token"]
    table = simple_table("", ["parameters", "active", "share", "forward FLOPs", "share"])
    for role, name in ROLES.items():
        total, active = (counts[which].get(role) for which in ("by_role", "active_by_role"))
        forward = cost["forward_by_role"].get(role)
        if total is None and forward is None:
            continue
        cells = [count(total), count(active), f"{active / counts['active']:.1%}"] if total is not None else [""] * 3
        cells += [work(forward), f"{forward / cost['forward']:.1%}"] if forward is not None else [""] * 2
        table.add_row(name, *cells)
    table.add_row("[bold]all[/bold]", count(counts["total"]), count(counts["active"]), "", work(cost["forward"]), "")
    if counts["active"] != counts["active_without_input_embedding"]:
        table.add_row("without input embedding", "", count(counts["active_without_input_embedding"]))
    both = (counts["total_without_embeddings"], counts["active_without_embeddings"])
    table.add_row("without embeddings", *map(count, both))
    console.print(table)


def _training(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    cost, train = plan["flops_per_token"], plan["training"]
    again = f" + {work(cost['recompute'])} again" if cost["recompute"] else ""
    backward = f"{work(cost['forward'])} forward + {work(cost['backward'])} backward{again}"
    tokens = f"{count(train['tokens'])} in {train['steps']:,} steps of {count(train['tokens_per_step'])}"
    return [
        ("FLOPs of a token", f"{work(cost['total'])} = {backward}, {train['seq_len']:,} tokens seen"),
        ("tokens", f"{tokens}, {count(train['tokens_per_active_parameter'])} for each active parameter"),
        ("FLOPs", work(train["flops"])),
        ("20 tokens a parameter", f"{count(train['chinchilla_tokens'])} tokens, {work(train['chinchilla_flops'])}"),
    ]


def _memory(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    held, train = plan["memory"], plan["training"]
    split = ", all of it split" if held["shard"] else ""
    number = held["sequences"]
    sequences = f"{number} sequence{'s' * (number > 1)} at once"
    rows = [("all", f"{size(held['total'])} (dp {held['dp']}, ep {held['ep']}{split}, {sequences})")]
    names = {"weights": "weights", "gradients": "gradients", "optimizer": f"optimizer, {train['optimizer']}"}
    names |= {"average": "averaged weights", "cast_weights": "copies of weights", "head": "head and its chunk"}
    rows += [(name, size(held[key])) for key, name in names.items() if held[key]]
    modes = ", ".join(f"{mode} {size(number)}" for mode, number in held["activations_by_recompute"].items())
    return [*rows, ("activations", f"{size(held['activations'])}; by train.recompute: {modes}")]


def _routing(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    shape, routing = plan["shape"], plan["routing"]
    if routing is None:
        return []
    pools = [_fraction(pool["granularity"]) for pool in shape["pools"] if pool["granularity"]]
    shared = f" + {_fraction(shape['shared_granularity'])} shared" if shape["shared_granularity"] else ""
    tokens = routing["tokens_per_expert_per_step"]
    sets = routing["log2_combinations"]
    rows = [
        ("granularity F/4D", f"{', '.join(pools)}{shared}; K·g = {shape['width']:.3g} of a layer 4·D wide"),
        ("sparsity E/K", f"{shape['sparsity']:.4g}"),
        ("tokens of an expert", f"{', '.join(map(count, tokens if isinstance(tokens, list) else [tokens]))} a step"),
        ("sets of experts", _sets(routing["combinations"], sets)),
    ]
    if routing["expected_drop"] is not None:
        uneven = f"{routing['expected_drop_uneven']:.2%} at a load CV of 0.3"
        rows.append(("pairs without a place", f"{routing['expected_drop']:.2%} of even routing, {uneven}"))
    return rows


def _sets(exact: Mapping[str, int | None], bits: Mapping[str, float | None]) -> str:
    def said(which: str) -> str:
        number, log = exact[which], bits[which]
        if number is not None and number < 1e6:
            return f"{number:,}"
        return "unknown" if log is None else f"2^{log:.1f}"

    flat, grouped = said("flat"), said("grouped")
    return flat if exact["flat"] == exact["grouped"] and bits["flat"] == bits["grouped"] else f"{grouped} of {flat}"


def _fraction(value: float) -> str:
    """Return 1/4 for 0.25."""
    inverse = 1 / value
    return f"1/{inverse:.0f}" if inverse > 1 and abs(inverse - round(inverse)) < 1e-9 else f"{value:.4g}"


def _plain(value: float) -> str:
    return f"{value:.4g}"


COMPARED = [
    ("parameters", count, "parameters.total"),
    ("active", count, "parameters.active"),
    ("… no input embedding", count, "parameters.active_without_input_embedding"),
    ("… no embeddings", count, "parameters.active_without_embeddings"),
    ("width D", count, "shape.dim"),
    ("layers", count, "shape.num_layers"),
    ("experts E", count, "shape.num_experts"),
    ("of a token K", count, "shape.top_k"),
    ("granularity F/4D", _plain, "shape.granularity"),
    ("sparsity E/K", _plain, "shape.sparsity"),
    ("log2 of sets", _plain, "routing.log2_combinations.grouped"),
    ("FLOPs of a token", work, "flops_per_token.total"),
    ("training tokens", count, "training.tokens"),
    ("training FLOPs", work, "training.flops"),
    ("20 tokens a parameter", count, "training.chinchilla_tokens"),
    ("memory of a rank", size, "memory.total"),
    ("… activations", size, "memory.activations"),
]


def _at(plan: Mapping[str, Any], place: str) -> Any:
    value: Any = plan
    for key in place.split("."):
        value = None if value is None else value.get(key)
    return value
