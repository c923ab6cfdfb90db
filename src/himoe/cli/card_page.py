"""Prints a card: docstrings as they were written, wrapped to the terminal, Markdown tables as tables."""

import re
import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from himoe.cli.cards import Card
from himoe.cli.catalogue import SINGULAR
from himoe.cli.docstrings import ARXIV

WIDEST = 110
"""Lines longer than this are hard to read, however wide the terminal."""
BULLET = "- "

EVERY_BALANCER = (
    "Every balancer of a configuration also takes `schedule = { kind, steps, scales }` and `per_group = true`, see "
    "docs/configuration.md."
)


def print_card(console: Console, card: Card) -> None:
    """Print an entry in full; a recipe exactly as it is in its file."""
    if card.table == "recipes":
        print(card.configuration.rstrip())
        return
    width = min(console.width, WIDEST)
    console.print(f"[bold]{escape(card.name)}[/bold] · {SINGULAR[card.table]}", highlight=False)
    _print_block(console, card.description or "It has no docstring.", width, indent="")
    console.print()
    _print_rows(console, _facts(card), width)
    if blocks := [block for block in (*re.split(r"\n\s*\n", card.opening), *card.text) if block.strip()]:
        console.print("\n[bold]How it works[/bold]", highlight=False)
        for number, block in enumerate(blocks):
            console.print() if number else None
            _print_block(console, block, width)
    if card.options:
        console.print("\n[bold]Options[/bold]", highlight=False)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), width=width - 2)
        for column in ("name", "default", "kind: meaning"):
            table.add_column(column, header_style="dim")
        for option in card.options:
            meaning = f"{option.kind}: {option.meaning}" if option.meaning else option.kind
            table.add_row(*map(escape, (option.name, option.default, meaning)))
        console.print(Padding(table, (0, 0, 0, 2)), highlight=False)
    if card.table == "balancers":
        console.print()
        _print_block(console, EVERY_BALANCER, width)
    console.print("\n[bold]In a configuration[/bold]", highlight=False)
    if card.configuration:
        print(textwrap.indent(card.configuration.rstrip(), "  "))
    else:
        _print_block(console, "In Python only: an option that must be given is a tensor.", width)


def _facts(card: Card) -> list[tuple[str, str]]:
    """Return the short facts, those that are known and are this kind's business."""
    facts, yes = card.facts, {True: "yes", False: "no"}
    rows = _rows("paper", [_link(paper) for paper in card.papers])
    rows += [("defined in", card.where)]
    composed = {
        table if len(names) > 1 else SINGULAR[table]: ", ".join(names) for table, names in facts.made_of.items()
    }
    rows += _rows("made of", [f"{table} {names}" for table, names in composed.items()])
    if facts.balances_load is not None:
        rows += [("balances load", yes[facts.balances_load])]
    if facts.causal is not None and card.table not in ("scores", "experts"):
        rows += [("causal", "yes" if facts.causal else "no: refused in a language model unless allowed")]
    rows += _rows("learns", [f"{name} {shape}" for name, shape in facts.parameters.items()])
    state = [f"{name} {shape}" for name, shape in facts.state.items()]
    return rows + _rows("state", state or ["none"] * (card.table in ("balancers", "presets")))


def _link(paper: str) -> str:
    return f"arXiv {paper}, https://arxiv.org/abs/{paper}" if ARXIV.fullmatch(paper) else paper


def _rows(title: str, lines: Sequence[str]) -> list[tuple[str, str]]:
    return [("" if number else title, line) for number, line in enumerate(lines)]


def _print_rows(console: Console, rows: Sequence[tuple[str, str]], width: int) -> None:
    first = max(len(name) for name, _ in rows) + 2
    for name, text in rows:
        lines = textwrap.wrap(text, width - first, break_long_words=False, break_on_hyphens=False)
        for number, line in enumerate(lines):
            console.print(f"{'' if number else name:<{first}}{escape(line)}", highlight=False, soft_wrap=True)


def _print_block(console: Console, block: str, width: int, indent: str = "  ") -> None:
    """Print one block: a Markdown table as a table, formulas and code as they are, prose wrapped."""
    lines = block.splitlines()
    if lines[0].startswith("|"):
        rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
        _print_table(console, [row for row in rows if set("".join(row)) - set("-: ")], width, indent)
    elif any(line.startswith(BULLET) for line in lines) and all(line.startswith((BULLET, "  ")) for line in lines[1:]):
        _print_list(console, lines, width, indent)
    elif any(line.startswith((" ", ">>>")) for line in lines):
        console.print(escape(textwrap.indent(block, indent)), highlight=False, soft_wrap=True)
    else:
        text = textwrap.fill(
            " ".join(lines), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )
        console.print(escape(text), highlight=False, soft_wrap=True)


def _print_list(console: Console, lines: Sequence[str], width: int, indent: str) -> None:
    """Print points, each wrapped, under the line that may stand before them."""
    points: list[str] = []
    for line in lines:
        if points and not line.startswith(BULLET):
            points[-1] += f" {line.strip()}"
        else:
            points.append(line)
    for point in points:
        hanging = indent + " " * len(BULLET) if point.startswith(BULLET) else indent
        text = textwrap.fill(point, width, initial_indent=indent, subsequent_indent=hanging, break_on_hyphens=False)
        console.print(escape(text), highlight=False, soft_wrap=True)


def _print_table(console: Console, rows: Sequence[Sequence[str]], width: int, indent: str) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(Padding(table, (0, 0, 0, len(indent))), highlight=False, width=width)
