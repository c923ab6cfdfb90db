"""The tables that people read at the end of a command."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from himoe.cli.catalogue import Entry
from himoe.run_folder import CHECKPOINTS, read_log

SHOWN_ALARMS = 3


def print_summary(console: Console, summary: Mapping[str, Any], run: Path) -> None:
    """Print what a training run came to: domains, layers, speed, and where the files are."""
    print_domains(console, summary)
    print_layers(console, summary.get("layers", []))
    memory = f", peak memory {mib:,.0f} MiB" if (mib := summary["peak_memory_mib"]) else ""
    facts = [
        (summary["status"], f"step {summary['step']:,}, {summary['tokens']:,} tokens in {summary['seconds']:,.0f} s"),
        *_best(summary, run),
        ("speed", f"{summary['tokens_per_second'] or 0:,.0f} tokens/s{memory}"),
        ("run folder", str(run)),
    ]
    if (page := run / "report.html").exists():
        facts.append(("report", str(page)))
    alarms = [line for line in read_log(run / "metrics.jsonl") if line.get("kind") == "alarm"]
    facts += [("alarm", str(line.get("text"))) for line in alarms[:SHOWN_ALARMS]]
    if len(alarms) > SHOWN_ALARMS:
        facts.append(("", f"{len(alarms) - SHOWN_ALARMS} more alarms: see the report, or metrics.jsonl"))
    width = max(12, *(len(name) for name, _ in facts))
    for name, fact in facts:
        console.print(f"{name:<{width}} {escape(fact)}", highlight=False, soft_wrap=True)


def _best(summary: Mapping[str, Any], run: Path) -> list[tuple[str, str]]:
    """Return the fact about the best evaluation along the way, unless the run ended with it."""
    best = summary.get("best")
    if not best or best["step"] == summary["step"]:
        return []
    kept = (run / CHECKPOINTS / f"step-{best['step']:08}").is_dir()
    use = " (himoe eval … --checkpoint best)" if kept else ""
    return [("best", f"step {best['step']:,}, {best['bits_per_byte']:.3f} bits per byte on the text scored then{use}")]


def print_evaluation(console: Console, result: Mapping[str, Any]) -> None:
    """Print what an evaluation found: domains, the length of text that helps, the use of the experts."""
    which = {"averaged": ", averaged weights", "trained": ""}[result["weights"]]
    console.print(
        f"[bold]{escape(result['run'])}[/bold], {result['checkpoint']}{which}, {result['seq_len']:,} tokens at once\n",
        highlight=False,
        soft_wrap=True,
    )
    print_domains(console, result)
    _print_buckets(console, result)
    _print_usage(console, result)


def _print_buckets(console: Console, result: Mapping[str, Any]) -> None:
    """Print bits per byte by context and by document length; nothing where all tokens are alike."""
    context, length = ({row["from"]: row for row in result[key]} for key in ("by_context", "by_length"))
    if len(context) < 2 and len(length) < 2:
        return
    console.print("[bold]Bits per byte by number of tokens[/bold]", highlight=False)
    table = simple_table("tokens", ["seen before", "share", "in the document", "share"])
    ends = {row["from"]: row["to"] for row in [*result["by_context"], *result["by_length"]]}
    total = sum(row["tokens"] for row in context.values())
    for first, last in sorted(ends.items()):
        cells = []
        for rows in (context, length):
            row = rows.get(first)
            cells += [_number(row["bits_per_byte"]), f"{100 * row['tokens'] / total:.0f} %"] if row else ["–", ""]
        table.add_row(f"{first:,}–{last:,}", *cells)
    console.print(table)
    console.print("seen before: tokens of the same document that the model saw first.", style="dim")
    console.print()


def _print_usage(console: Console, result: Mapping[str, Any]) -> None:
    """Print how evenly this text used the experts of each layer, and what they tell about the domains."""
    layers = result.get("layers")
    if not layers:
        return
    domains = {name: {row["layer"]: row for row in one["layers"]} for name, one in result["domains"].items()}
    several = len(domains) > 1
    columns = ["MaxVio", "CV", "effective", "dead"] + ["MaxVio, worst domain", "I", "I, floor"] * several
    console.print("[bold]Use of the experts on this text[/bold]", highlight=False)
    table = simple_table("layer", columns)
    for layer in layers:
        number = layer["layer"]
        cells = [_number(layer["max_vio_global"]), _number(layer["cv_global"])]
        cells += [f"{layer['effective_experts']:.1f}", str(len(layer["dead_experts"]))]
        if several:
            name, worst = max(domains.items(), key=lambda one: one[1][number]["max_vio_global"])
            cells.append(f"{escape(name)} {worst[number]['max_vio_global']:.3f}")
            cells += [_number(layer[f"domain_information{which}"]) for which in ("", "_floor")]
        table.add_row(str(number), *cells)
    console.print(table)
    experts = len(layers[0]["load"])
    console.print("MaxVio: busiest expert over the mean, less 1. CV: deviation over the mean.", style="dim")
    console.print(
        f"effective: {experts} when all {experts} are used alike. dead: under 1 % of a fair share.", style="dim"
    )
    if several:
        most = layers[0]["domain_information_maximum"]
        console.print(f"I: bits that an expert tells of the domain, at most {most:.2f};", style="dim", highlight=False)
        console.print("at or under the floor it may be chance.", style="dim")
    console.print()


def print_domains(console: Console, result: Mapping[str, Any]) -> None:
    """Print bits per byte and perplexity of each domain, against byte statistics where they are known."""
    if not result["domains"]:  # stopped before the first evaluation
        return
    compared = any(values.get("bigram") for values in result["domains"].values())
    extra = ["unigram", "bigram", "under bigram"] if compared else []
    console.print("[bold]Bits per byte[/bold]")
    table = simple_table("domain", ["model", *extra, "perplexity"])
    for name, values in result["domains"].items():
        baselines = []
        if compared:
            unigram, bigram = values.get("unigram"), values.get("bigram")
            bits = values["bits_per_byte"]
            share = f"{100 * (1 - bits / bigram):.1f} %" if bigram and bits is not None else "–"
            baselines = [_number(unigram), _number(bigram), share]
        table.add_row(escape(name), _number(values["bits_per_byte"]), *baselines, f"{values['perplexity']:,.2f}")
    if len(result["domains"]) > 1 and result.get("loss") is not None:
        perplexity = math.exp(min(result["loss"], 700.0))
        table.add_row("all text", _number(result["bits_per_byte"]), *["–" for _ in extra], f"{perplexity:,.2f}")
    console.print(table)
    console.print()


def print_layers(console: Console, layers: Sequence[Mapping[str, Any]]) -> None:
    """Print how evenly each layer used its experts."""
    if not layers:
        return
    columns = {
        "MaxVio": "max_vio_window",
        "MaxVio, batch": "max_vio_batch",
        "CV": "cv_window",
        "Σm²": "group_mass",
        "C": "concentration",
    }
    if any(layer.get("experts_per_token", 0) % 1 for layer in layers):
        columns["experts"] = "experts_per_token"
    if any(layer.get("truncated_mass") for layer in layers):
        columns["cut off"] = "truncated_mass"
    if any(layer.get("drop_rate") for layer in layers):
        columns["dropped"] = "drop_rate"
    dead = any(layer.get("dead_experts") for layer in layers)
    console.print("[bold]Balance of the layers[/bold]", highlight=False)
    table = simple_table("layer", [*columns, *["dead"] * dead])
    for layer in layers:
        cells = [_number(layer.get(key)) for key in columns.values()]
        table.add_row(str(layer["layer"]), *cells, *[str(len(layer.get("dead_experts") or []))] * dead)
    console.print(table)
    console.print("MaxVio, CV: last 50 steps together; the others: mean since the last log line.", style="dim")
    console.print("MaxVio: busiest expert over the mean, less 1. CV: deviation over the mean.", style="dim")
    console.print("Σm²: 1/groups to 1, all on one group. C: 1/group size to 1, all on one expert.", style="dim")
    if dead:
        console.print("dead: experts with under 1 % of a fair share.", style="dim")
    console.print()


def print_entries(console: Console, tables: Mapping[str, Sequence[Entry]]) -> None:
    """Print each table's names with what they are in a line and their paper; a recipe stands under its base."""
    for kind, table in tables.items():
        console.print(f"[bold]{kind}[/bold]")
        lines = Table.grid(padding=(0, 2))
        lines.width = min(console.width, 120)
        lines.add_column()
        lines.add_column(ratio=1)
        if papers := any(entry.paper for entry in table):
            lines.add_column(max_width=16)
        indents: dict[str, str] = {}
        for entry in table:
            indents[entry.name] = "  " + indents.get(entry.base or "", "")
            row = [indents[entry.name] + entry.name, escape(entry.description)]
            lines.add_row(*row, *[entry.paper or ""] * papers)
        console.print(lines, highlight=False)
        console.print()
    if any(entry.paper for table in tables.values() for entry in table):
        text = "On the right: the paper, a number at https://arxiv.org/abs/NUMBER."
        console.print(text, style="dim", highlight=False)
    console.print("himoe list NAME shows an entry in full.", style="dim", highlight=False)
    if "recipes" in tables:
        console.print("himoe train RECIPE --dry-run shows a recipe with every key.", style="dim", highlight=False)


def simple_table(first: str, columns: Sequence[str]) -> Table:
    """Return a table without lines: the first column to the left, the others to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
