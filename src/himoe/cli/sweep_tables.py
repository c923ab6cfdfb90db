"""What `himoe sweep` prints: runs before they start, what they came to, answers to queries."""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.markup import escape

from himoe.cli.amounts import count
from himoe.cli.tables import simple_table
from himoe.errors import HimoeError
from himoe.plan import flops, parameters, shape_of
from himoe.sweep import Run, SweepResult, shipped_names
from himoe.sweep.spec import shipped_text

SHOWN_FAILURES = 5


def runs_as_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return name, parameters and training FLOPs of every run, as himoe.plan counts them; None where it cannot."""
    return [{"run": run.id, "name": run.name, **_cost(run)} for run in runs]


def _cost(run: Run) -> dict[str, Any]:
    train = run.config.train
    tokens = train.steps * train.batch_size * train.seq_len
    try:
        shape = shape_of(run.config)
    except HimoeError:  # experts of somebody's own, or a tokenizer whose file alone knows its size
        return {"active_parameters": None, "total_parameters": None, "tokens": tokens, "training_flops": None}
    counts, each = parameters(shape), flops(shape, train.seq_len, train.recompute).total
    return {
        "active_parameters": counts.active,
        "total_parameters": counts.total,
        "tokens": tokens,
        "training_flops": tokens * each,
    }


def print_runs(console: Console, rows: Sequence[Mapping[str, Any]], merged: int) -> None:
    """Print a line for every run, and the sums."""
    table = simple_table("run", ["active", "total", "tokens", "FLOPs"])
    for row in rows:
        cells = [count(row[key]) if row[key] is not None else "–" for key in KEYS]
        table.add_row(escape(row["name"] or row["run"]), *cells, f"{row['training_flops'] or 0:.2e}")
    console.print(table)
    total = sum(row["training_flops"] or 0 for row in rows)
    tokens = sum(row["tokens"] for row in rows)
    same = f" ({merged} more are the same as others)" if merged else ""
    console.print(f"\n{len(rows)} runs{same}, {tokens:,} tokens, {total:.3g} FLOPs", highlight=False)


KEYS = ("active_parameters", "total_parameters", "tokens")


def print_result(console: Console, result: SweepResult) -> None:
    """Print how many runs ended how, where the table is, and which failed."""
    counts = ", ".join(f"{number} {status}" for status, number in sorted(result.counts.items()))
    console.print(
        f"{len(result.runs)} runs: {counts}; table {result.out / 'runs.parquet'}", highlight=False, soft_wrap=True
    )
    names = {run.id: run.name for run in result.runs}
    for id, error in list(result.errors.items())[:SHOWN_FAILURES]:
        log = result.out / "runs" / id / "log.txt"
        console.print(f"failed: {names[id]}: {error} (see {log})", highlight=False, markup=False, soft_wrap=True)
    if len(result.errors) > SHOWN_FAILURES:
        ask = f"himoe sweep query {result.out} \"select name, error from runs where status = 'failed'\""
        more = len(result.errors) - SHOWN_FAILURES
        console.print(f"and {more} more: {ask}", highlight=False, markup=False, soft_wrap=True)


def rows_of(answer: Any) -> list[dict[str, Any]]:
    """Return the rows of a pyarrow table as JSON can hold them."""
    return [{key: _plain(value) for key, value in row.items()} for row in answer.to_pylist(maps_as_pydicts="lossy")]


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float | bool | list | dict):
        return value
    return value.isoformat() if isinstance(value, datetime) else str(value)


def print_csv(answer: Any) -> None:
    """Print a pyarrow table as comma-separated values; maps are JSON."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(answer.column_names)
    for row in rows_of(answer):
        writer.writerow([json.dumps(value) if isinstance(value, list | dict) else value for value in row.values()])


def print_answer(console: Console, answer: Any) -> None:
    """Print a pyarrow table for people."""
    names = answer.column_names
    table = simple_table(escape(names[0]), [escape(name) for name in names[1:]])
    for row in rows_of(answer):
        table.add_row(*(escape(_cell(value)) for value in row.values()))
    console.print(table, highlight=False, soft_wrap=True)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value) if isinstance(value, list | dict) else str(value)


def print_shipped(console: Console, *, as_json: bool) -> None:
    """Print the sweeps that come with himoe, a line for each: its first comment."""
    found = {name: shipped_text(name).partition("\n")[0].lstrip("# ").strip() for name in shipped_names()}
    if as_json:
        print(json.dumps([{"name": name, "description": text} for name, text in found.items()]))
        return
    table = simple_table("sweep", [])
    table.add_column("what it asks")
    for name, text in found.items():
        table.add_row(name, escape(text))
    console.print(table, highlight=False)
