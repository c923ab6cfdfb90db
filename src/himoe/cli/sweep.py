"""`himoe sweep`: many runs of one question, and their table."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import Positional, UseAppendAction

from himoe.cli.many_runs import ManyRuns
from himoe.cli.parsing import Verb, option
from himoe.cli.sweep_tables import (
    print_answer,
    print_csv,
    print_result,
    print_runs,
    print_shipped,
    rows_of,
    runs_as_rows,
)
from himoe.config.loading import parse_sets
from himoe.errors import ConfigError
from himoe.sweep import Spec, build_table, expand, load_spec, query, run_sweep
from himoe.sweep.checks import check_runs
from himoe.sweep.expand import num_combinations


@dataclass(kw_only=True)
class Sweep(ManyRuns):
    """Do all runs of a sweep: every value of its axes with every other.

    Started again, also with more values, it does what has not ended yet.

    Examples:
      himoe sweep my.toml --dry-run
          the runs, their parameters and FLOPs, and nothing else
      himoe sweep my.toml --out sweeps/mine --workers 2
          two runs at a time; again after Ctrl-C, it goes on
      himoe sweep sparsity_granularity --data novels/ --out sweeps/sd
          one that comes with himoe, on your own text
      himoe sweep my.toml --out sweeps/mine --early-stop asha
          runs that are behind others end early
      himoe sweep my.toml --out sweeps/mine --engine ray --gpus-per-run 0.25
          on Ray, four runs to a GPU
      himoe sweep query sweeps/mine "select name, cross_entropy from runs"
          ask the table in SQL (views runs and curves)
      himoe sweep table sweeps/mine
          make the table again from the run folders
      himoe sweep list
          the sweeps that come with himoe
    """

    spec: Annotated[Positional[str | None], option("SPEC.toml | NAME")] = None
    """A TOML file (docs/sweep.md), or the name of a sweep that comes with himoe."""
    out: Annotated[Path | None, option("DIR")] = None
    """Folder of the sweep: its table, and a run folder for every run. Several sweeps may share one."""
    data: Annotated[Path | None, option("PATH")] = None
    """What to learn, in place of what the sweep says."""
    changes: Annotated[UseAppendAction[tuple[str, ...]], option("KEY=VALUE", "set")] = ()
    """Set one value in all runs, in the place of an axis of that name; may be given often."""
    early_stop: Annotated[str | None, option("asha")] = None
    """End runs early whose validation cross-entropy is behind that of others at the same step. Without it: no run."""
    dry_run: Annotated[bool, option()] = False
    """Print the runs, and start none. Refuses what building their models refuses; the text is not looked at."""

    def run(self, command: list[str]) -> int:  # noqa: ARG002
        """Do the runs; return 1 where some failed."""
        spec = self._spec()
        console = Console(stderr=self.as_json)
        if self.dry_run:
            runs = expand(spec)
            check_runs(runs, console, text=False)
            merged = num_combinations(spec) - len(runs)
            found = runs_as_rows(runs)
            print(json.dumps({"runs": found, "merged": merged})) if self.as_json else print_runs(console, found, merged)
            return 0
        if self.out is None:
            raise ConfigError("--out: say where the sweep goes, as in --out sweeps/mine")
        result = run_sweep(
            spec,
            self.out,
            early_stop=self.early_stop,
            console=Console(stderr=True),
            **self.how(),
        )
        if self.as_json:
            rows = [{"run": run.id, "name": run.name, "status": result.status[run.id]} for run in result.runs]
            print(json.dumps({"out": str(self.out), "counts": result.counts, "runs": rows, "errors": result.errors}))
        else:
            print_result(console, result)
        return 1 if result.counts["failed"] else 0

    def _spec(self) -> Spec:
        if self.spec is None:
            raise ConfigError("name a sweep: a TOML file, or one of himoe sweep list")
        spec = load_spec(self.spec)
        changes: dict[str, Any] = {}
        if self.data:
            changes["data"] = str(self.data)
        if self.changes:
            given = _flat(parse_sets(self.changes))
            changes["set"] = spec.set | given
            changes["axes"] = {key: values for key, values in spec.axes.items() if key not in given}
        return load_spec(spec.model_dump(exclude_none=True) | changes) if changes else spec


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree that `--set` arguments describe with the dotted keys of `[set]`."""
    flat: dict[str, Any] = {}
    for section, value in tree.items():
        flat |= {f"{section}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {section: value}
    return flat


@dataclass(kw_only=True)
class SweepTable(Verb):
    """Make the table of a sweep again from its run folders.

    Examples:
      himoe sweep table sweeps/mine
          writes sweeps/mine/runs.parquet and curves.parquet
      himoe sweep table sweeps/mine --json
          says how many runs and lines they have
    """

    out: Annotated[Positional[Path], option("DIR")]
    """Folder of the sweep."""

    def run(self, command: list[str]) -> int:  # noqa: ARG002
        """Write both files and print where they are."""
        table = build_table(self.out)
        runs, curves = table.runs(), table.curves()
        files = {"runs": str(self.out / "runs.parquet"), "curves": str(self.out / "curves.parquet")}
        if self.as_json:
            print(json.dumps({**files, "num_runs": runs.num_rows, "num_curve_lines": curves.num_rows}))
        else:
            print(f"{files['runs']}    {runs.num_rows} runs, {runs.num_columns} columns")
            print(f"{files['curves']}  {curves.num_rows} lines")
        return 0


@dataclass(kw_only=True)
class SweepQuery(Verb):
    """Ask the table of a sweep in SQL: the views runs and curves.

    Examples:
      himoe sweep query sweeps/mine "select name, cross_entropy from runs"
          a table
      himoe sweep query sweeps/mine "describe runs"
          the columns and their types
      himoe sweep query sweeps/mine "from curves" --csv
          comma-separated values for another program
    """

    out: Annotated[Positional[Path], option("DIR")]
    """Folder of the sweep."""
    sql: Annotated[Positional[str], option("SQL")]
    """The query, in DuckDB's SQL. Columns named like keys stand in quotes, as in "moe.top_k"."""
    as_csv: Annotated[bool, option(name="csv")] = False
    """Print comma-separated values."""

    def run(self, command: list[str]) -> int:  # noqa: ARG002
        """Print the answer."""
        answer = query(self.out, self.sql)
        if self.as_json:
            print(json.dumps(rows_of(answer)))
        elif self.as_csv:
            print_csv(answer)
        else:
            print_answer(Console(), answer)
        return 0


@dataclass(kw_only=True)
class SweepList(Verb):
    """Name the sweeps that come with himoe.

    Examples:
      himoe sweep list
          a line for each
      himoe sweep list --json
          the same for a program
    """

    def run(self, command: list[str]) -> int:  # noqa: ARG002
        """Print a line for each."""
        print_shipped(Console(), as_json=self.as_json)
        return 0


SWEEP_VERBS: dict[str, type[Verb]] = {"table": SweepTable, "query": SweepQuery, "list": SweepList}
