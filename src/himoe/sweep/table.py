"""The table of a sweep, `runs.parquet` and `curves.parquet`: made from the run folders, by whomever, at any time.

A `Table` remembers what it has read of folders that have not changed since; a new one reads all of them, and both give
the same files.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from himoe.errors import MissingExtraError, RunFolderError
from himoe.files import replacing
from himoe.run_folder import is_run_folder, readable_disk_errors
from himoe.sweep.expand import words
from himoe.sweep.facts import Facts, read_facts
from himoe.sweep.status import ERROR

FILES = ("config.json", "env.json", "metrics.jsonl", "summary.json", ERROR)
"""What a row is made of; load.jsonl is written together with metrics.jsonl."""


def import_pyarrow() -> Any:
    """Return the package; raises MissingExtraError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "sweep") from error
    return pyarrow


class Table:
    """The runs under one folder.

    Args:
        out: the sweep's folder, whose `runs/` holds the run folders; it may not be there yet.
    """

    def __init__(self, out: Path) -> None:
        self.out, self._arrow = Path(out), import_pyarrow()
        self._read: dict[str, tuple[tuple[Any, ...], Facts]] = {}

    def read(self) -> Self:
        """Read what has changed since the last time, and return the table."""
        found: dict[str, tuple[tuple[Any, ...], Facts]] = {}
        for folder in sorted(filter(is_run_folder, (self.out / "runs").glob("*"))):
            stamp = tuple(map(_stamp, (folder / name for name in FILES)))
            known = self._read.get(folder.name)
            if known is not None and known[0] == stamp:
                found[folder.name] = known
            elif (facts := read_facts(folder)) is not None:
                found[folder.name] = (stamp, facts)
        self._read = found
        return self

    def runs(self) -> Any:
        """Return the table `runs`, sorted by run."""
        facts = [one for _, one in self._read.values()]
        varied = _varied(facts)
        names = [words({key: one.keys[key] for key in varied if one.keys.get(key) is not None}) for one in facts]
        pa, columns = self._arrow, {}
        for column, kind in _schema(pa).items():
            if column == "name":
                columns[column] = pa.array(names, pa.string())
                continue
            values = [one.row[column] for one in facts]
            columns[column] = pa.array([_entries(value) for value in values], kind)
        for key in varied:
            if key != "seed":
                columns[key] = _column(pa, [one.keys.get(key) for one in facts])
        return pa.table(columns)

    def curves(self) -> Any:
        """Return the table `curves`, sorted by run and step."""
        pa = self._arrow
        kinds = {"run": pa.string(), "step": pa.int64(), "tokens": pa.int64()}
        kinds |= {"cross_entropy": pa.float64(), "train_cross_entropy": pa.float64()}
        lines = [line for _, facts in self._read.values() for line in facts.curve]
        return pa.table({name: pa.array([line[name] for line in lines], kind) for name, kind in kinds.items()})

    def write(self) -> None:
        """Replace both files, each in one step."""
        with readable_disk_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            for name, table in (("runs", self.runs()), ("curves", self.curves())):
                with replacing(self.out / f"{name}.parquet") as file:
                    self._arrow.parquet.write_table(table, file)


def build_table(out: Path) -> Table:
    """Read all run folders of a sweep, write its files, and return the table.

    Raises RunFolderError where there is no sweep.
    """
    if not (Path(out) / "runs").is_dir():
        raise RunFolderError(f"{out} holds no sweep: there is no folder {Path(out) / 'runs'}")
    table = Table(out).read()
    table.write()
    return table


def is_stale(out: Path) -> bool:
    """Return whether a run has written something since the table was."""
    try:
        written = min((out / f"{name}.parquet").stat().st_mtime_ns for name in ("runs", "curves"))
    except OSError:
        return True
    folders = list((out / "runs").glob("*"))
    changed = [_stamp(folder / name)[0] for folder in folders for name in FILES]
    changed += [folder.stat().st_mtime_ns for folder in [out / "runs", *folders]]  # an entry that is gone
    return max(changed, default=0) >= written


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, -1
    return found.st_mtime_ns, found.st_size


def _varied(facts: Iterable[Facts]) -> list[str]:
    """Return the keys whose values differ between runs, in the order of the configuration."""
    seen: dict[str, set[str]] = {}
    facts = list(facts)
    for key in dict.fromkeys(key for one in facts for key in one.keys):
        seen[key] = {json.dumps(one.keys.get(key), sort_keys=True) for one in facts}
    found = [key for key, values in seen.items() if len(values) > 1]
    return sorted(found, key=lambda key: key == "seed")  # which comes last


def _column(pa: Any, values: list[Any]) -> Any:
    """Return a column in its values' own type: whole numbers, numbers, true and false, text, or JSON for the rest."""
    kinds = {type(value) for value in values if value is not None}
    for kind, of in ((bool, pa.bool_()), (int, pa.int64()), (float, pa.float64()), (str, pa.string())):
        if kinds <= {kind} or (kind is float and kinds <= {int, float}):
            return pa.array(values, of)
    return pa.array([None if value is None else json.dumps(value) for value in values], pa.string())


def _entries(value: Any) -> Any:
    return list(value.items()) if isinstance(value, dict) else value


def _schema(pa: Any) -> dict[str, Any]:
    """Return the columns that every table has, in order, with their types."""
    text, whole, real, by_name = pa.string(), pa.int64(), pa.float64(), pa.map_(pa.string(), pa.float64())
    columns = {"run name status error recipe": text, "seed": whole, "preset selector balancers": text}
    columns |= {"num_experts top_k expert_dim dim num_layers": whole, "granularity sparsity": real}
    columns |= {"total_parameters active_parameters active_without_embeddings tokens": whole}
    columns |= {"training_flops": real, "steps": whole, "learning_rate cross_entropy bits_per_byte": real}
    columns |= {"bits_per_byte_by_domain": by_name, "cv max_vio": real, "cv_by_level max_vio_by_level": by_name}
    columns |= {"dead_experts wall_seconds tokens_per_second": real, "started": pa.timestamp("s", tz="UTC")}
    columns |= {"commit version kernels": text}
    return {name: kind for names, kind in columns.items() for name in names.split()}
