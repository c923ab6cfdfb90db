"""Reads the tables of a sweep: `runs`, one row a run, and `curves`, its evaluations along the way (docs/analysis.md).

A row that is no finished run, or that ended before the others of its setting, is never averaged: `split` lists it with
the reason. Rows stay plain dictionaries, since every sweep has columns of its own, the keys that it varied.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from himoe.errors import ConfigError, DataError, MissingExtraError, nearest

if TYPE_CHECKING:
    import pyarrow as pa

RUNS, CURVES = "runs.parquet", "curves.parquet"
NEEDED = ("run", "status", "seed", "tokens", "cross_entropy")
SAME_LENGTH = 0.005
"""Runs whose tokens differ by less than this share have trained equally long."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """The rows of a sweep.

    Attributes:
        name: of the folder or table.
        rows: every run, failed ones included.
        curves: of a run, (tokens, cross-entropy) of its evaluations, ascending.
        varied: the configuration's keys that differ between the rows.
        at: what the losses were read at, where not at the end of the runs.
    """

    name: str
    rows: list[Row]
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    varied: tuple[str, ...] = ()
    at: str = ""


@dataclass(frozen=True)
class Left:
    """A run that no mean holds, and why."""

    run: str
    name: str
    seed: Any
    reason: str


def read_sweep(source: Path | str | pa.Table, curves: pa.Table | None = None) -> Sweep:
    """Read a sweep's folder, its runs.parquet, or the tables themselves.

    Raises:
        DataError: there is no table, or it lacks columns.
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "analysis") from error
    if not isinstance(source, Path | str):
        return from_rows("runs", source.to_pylist(), [] if curves is None else curves.to_pylist())
    path = Path(source)
    place = path / RUNS if path.is_dir() else path
    if not place.is_file():
        raise DataError(f"{path}: there is no {RUNS} of a sweep; name the folder that `himoe sweep` wrote")
    try:
        rows = pq.ParquetFile(place).read().to_pylist()
        beside = place.with_name(CURVES)
        lines = pq.ParquetFile(beside).read().to_pylist() if beside.is_file() else []
    except pa.ArrowException as error:
        text = str(error).splitlines()[0]
        raise DataError(f"{place}: not a whole Parquet file ({text}); let `himoe sweep` build it again") from error
    return from_rows(place.resolve().parent.name, rows, lines)


def from_rows(name: str, rows: Sequence[Row], curves: Iterable[Mapping[str, Any]] = ()) -> Sweep:
    """Return the sweep that rows and lines of curves are."""
    if missing := [column for column in NEEDED if not rows or column not in rows[0]]:
        raise DataError(f"{name}: the table of runs has no {', '.join(missing) if rows else 'rows'}; it must be `runs`")
    found: dict[str, dict[float, float]] = {}
    for line in curves:
        tokens, loss = number(line.get("tokens")), number(line.get("cross_entropy"))
        if tokens is not None and loss is not None:
            found.setdefault(str(line["run"]), {})[tokens] = loss
    keys = [key for key in rows[0] if "." in key and len({_plain(row.get(key)) for row in rows}) > 1]
    return Sweep(name, [dict(row) for row in rows], {run: sorted(one.items()) for run, one in found.items()}, (*keys,))


def number(value: Any) -> float | None:
    """Return a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _plain(value: Any) -> Any:
    """Return a value of a cell in a form that can be a key."""
    return value if isinstance(value, str | int | float | None) else json.dumps(value, sort_keys=True, default=str)


def identity(sweep: Sweep, row: Row) -> tuple[Any, ...]:
    """Return what makes runs one setting: the recipe and every varied key but the seed."""
    return (row.get("recipe"), *(_plain(row.get(key)) for key in sweep.varied))


def where(sweep: Sweep, conditions: Sequence[str]) -> Sweep:
    """Return the rows in which every `column=value` holds.

    Raises:
        ConfigError: no such column, or no row is left.
    """
    rows = sweep.rows
    for condition in conditions:
        column, equals, value = (part.strip() for part in condition.partition("="))
        if not equals or column not in sweep.rows[0]:
            known = [*sweep.varied, *(name for name in sweep.rows[0] if "." not in name)]
            raise ConfigError(f"--where {condition}: write COLUMN=VALUE with a column of runs{nearest(column, known)}")
        kept = [row for row in rows if _says(row.get(column), value)]
        if not kept:
            there = sorted({str(_plain(row.get(column))) for row in rows})[:12]
            raise ConfigError(f"--where {condition}: no run is left; {column} is {', '.join(there)}")
        rows = kept
    return replace(from_rows(sweep.name, rows), curves=sweep.curves, at=sweep.at)


def _says(cell: Any, text: str) -> bool:
    if number(cell) is not None:
        try:
            return float(text) == float(cell)
        except ValueError:
            return False
    return str(_plain(cell)).casefold() == text.casefold() or (cell is None and text in ("", "none", "null"))


def compare_at(sweep: Sweep, *, tokens: float | None = None, flops: float | None = None) -> Sweep:
    """Return the runs as they stood after equal tokens or FLOPs, read from their curves.

    Between two evaluations the loss is interpolated, linear in log tokens; beyond the last one there is none, and the
    run is left out with that reason. Every run that came so far counts, whatever became of it later: leaving out those
    that were stopped for being bad would flatter their setting.
    """
    rows = []
    for row in sweep.rows:
        spent, done = number(row.get("training_flops")), number(row.get("tokens"))
        target = tokens
        if flops is not None:
            target = flops * done / spent if spent and done else None
        loss = None if target is None else _read_off(sweep.curves.get(str(row["run"]), []), target)
        if loss is None:
            reached = sweep.curves.get(str(row["run"]), [])
            last = f"its curve ends at {reached[-1][0]:,.0f} tokens" if reached else "it has no curve"
            rows.append({**row, "status": "short", "error": last, "cross_entropy": None})
        else:
            at = {"tokens": target, "cross_entropy": loss, "bits_per_byte": None, "bits_per_byte_by_domain": None}
            cost = spent * target / done if spent and done and target else None
            rows.append({**row, **at, "status": "done", "training_flops": cost})
    what = f"{tokens:,.0f} tokens" if flops is None else f"{flops:.4g} FLOPs"
    return replace(sweep, rows=rows, at=what)


def _read_off(curve: list[tuple[float, float]], tokens: float) -> float | None:
    for (left, low), (right, high) in pairwise(curve):
        if left <= tokens <= right * (1 + 1e-9) and left > 0:
            share = math.log(tokens / left) / math.log(right / left)
            return low + share * (high - low)
    return next((loss for at, loss in curve if abs(at - tokens) <= 1e-9 * tokens), None)


def split(sweep: Sweep) -> tuple[dict[tuple[Any, ...], list[Row]], list[Left]]:
    """Return the runs of every setting that can be averaged, and those that cannot."""
    settings: dict[tuple[Any, ...], list[Row]] = {}
    left: list[Left] = []
    for row in sweep.rows:
        if reason := unusable(row):
            left.append(left_of(row, reason))
        else:
            settings.setdefault(identity(sweep, row), []).append(row)
    for key, rows in settings.items():
        longest = max(float(row["tokens"]) for row in rows)
        whole: dict[Any, Row] = {}
        for row in sorted(rows, key=lambda one: str(one.get("started") or "")):
            if row["tokens"] < longest * (1 - SAME_LENGTH):
                left.append(left_of(row, f"ended at {row['tokens']:,.0f} of the {longest:,.0f} tokens of its setting"))
                continue
            if row["seed"] in whole:
                left.append(left_of(whole[row["seed"]], "the same seed was run again later"))
            whole[row["seed"]] = row
        settings[key] = list(whole.values())
    return settings, left


def unusable(row: Row) -> str:
    """Return why no mean may hold this run; nothing where one may."""
    if row["status"] != "done":
        at = f" after {row['tokens']:,.0f} tokens" if number(row.get("tokens")) else ""
        error = f": {row['error']}" if row.get("error") else ""
        return f"{row['status']}{at}{error}"
    if number(row["cross_entropy"]) is None or not number(row["tokens"]):
        return "done, but without a validation loss or its tokens"
    return ""


def left_of(row: Row, reason: str) -> Left:
    """Return the run as one that is left out."""
    return Left(str(row["run"]), str(row.get("name") or ""), row["seed"], reason)
