"""`himoe compare`: strategies against each other on one recipe, seed by seed."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from tyro.conf import Positional, UseAppendAction

from himoe.cli.many_runs import ManyRuns
from himoe.cli.parsing import option
from himoe.cli.sweep_tables import print_runs, runs_as_rows
from himoe.config import Config
from himoe.errors import ConfigError, MissingExtraError, RunFolderError
from himoe.sweep.strategies import strategies

if TYPE_CHECKING:
    from himoe.analysis.comparison import Comparison


@dataclass(kw_only=True)
class Compare(ManyRuns):
    """Say which of several strategies is better, and how surely.

    All share data order, FLOPs, and a learning rate, tuned with a seed of its own.

    Started again, also with more seeds, it does what has not ended yet.

    Examples:
      himoe compare --strategies hi_moe,switch,dense --out comparisons/mine
          presets with their default options, and a dense network of equal cost
      himoe compare lm_small --strategies hi_moe,quantile,mine.toml --out DIR
          a balancer beside top-k, and a recipe of your own
      himoe compare --strategies hi_moe,switch --learning-rate 4e-3 --out DIR
          at a learning rate that is known
      himoe compare --strategies hi_moe,switch,dense --out DIR --against dense
          the same runs, seen from another of them
    """

    recipe: Annotated[Positional[str | None], option("[RECIPE]")] = None
    """What the strategies lie over: a recipe (himoe list recipes), or a TOML file. Without it: lm_demo."""
    strategies: Annotated[str, option("A,B,…")] = ""
    """Presets (himoe list presets) with their default options, balancers (himoe list balancers) beside plain top-k,
    dense, or recipes and TOML files."""
    seeds: Annotated[int, option("N")] = 5
    """How many seeds each is trained with: 1 to N."""
    against: Annotated[str | None, option("NAME")] = None
    """Which one the others are compared with. Without it: the first."""
    learning_rate: Annotated[float | None, option("RATE")] = None
    """Of all runs. Without it: tuned, by factors of 2, by the mean validation loss of all strategies on seed 0."""
    out: Annotated[Path | None, option("DIR")] = None
    """Folder of the comparison: a sweep's, and the page comparison.html."""
    data: Annotated[Path | None, option("PATH")] = None
    """What to learn, in place of what the recipe says."""
    changes: Annotated[UseAppendAction[tuple[str, ...]], option("KEY=VALUE", "set")] = ()
    """Set one value of the recipe, and of recipes and files among the strategies; may be given often."""
    dry_run: Annotated[bool, option()] = False
    """Print the runs, those of the tuning as far as they are known, and start none."""

    def run(self, command: list[str]) -> int:  # noqa: ARG002
        """Train, compare, write the page, and print; return 1 where runs failed."""
        found = self._strategies()
        console = Console(stderr=self.as_json)
        if self.dry_run:
            return self._dry_run(found, console)
        if self.out is None:
            raise ConfigError("--out: say where the comparison goes, as in --out comparisons/mine")
        if self.out.exists() and not self.out.is_dir():
            raise RunFolderError(f"{self.out} is a file; a comparison needs a folder: choose another with --out")
        # what brings numpy is imported where it is used: other verbs do without
        from himoe.analysis.comparison_page import write_comparison
        from himoe.cli.comparison_tables import print_comparison
        from himoe.sweep.comparison import compare_strategies

        if find_spec("plotly") is None:  # which the page needs, in the end
            raise MissingExtraError("plotly", "analysis")
        compared = compare_strategies(
            found,
            self.out,
            seeds=self.seeds,
            against=self.against,
            learning_rate=self.learning_rate,
            console=Console(stderr=True),
            **self.how(),
        )
        if not self.as_json:
            print_comparison(console, compared.comparison)
        page = write_comparison(compared.comparison, self.out / "comparison.html")
        if self.as_json:
            print(json.dumps({**document(compared.comparison), "out": str(self.out), "report": str(page)}))
        else:
            console.print(f"\nreport: {page}", highlight=False, soft_wrap=True)
        return 1 if compared.comparison.left else 0

    def _strategies(self) -> dict[str, Config]:
        names = [name.strip() for name in self.strategies.split(",") if name.strip()]
        return strategies(names, self.recipe, self.changes, self.data)

    def _dry_run(self, found: Mapping[str, Config], console: Console) -> int:
        from himoe.sweep.checks import check_runs
        from himoe.sweep.comparison import check_comparison, planned_runs

        check_comparison(found, self.seeds, self.against, self.learning_rate)
        runs = planned_runs(found, self.seeds, self.learning_rate)
        check_runs(runs, console, text=False)
        rows = runs_as_rows(runs)
        print(json.dumps({"runs": rows})) if self.as_json else print_runs(console, rows, 0)
        return 0


def document(found: "Comparison") -> dict[str, Any]:
    """Return a comparison as one tree."""
    strategies = []
    for one in found.strategies:
        tree = asdict(one)
        tree["runs"] = {str(seed): row["run"] for seed, row in tree.pop("rows").items()}
        strategies.append(tree)
    tuning = None
    if found.tuning is not None:
        losses = {f"{rate:g}": one for rate, one in found.tuning.losses.items()}
        best = {one.name: found.tuning.best_of(one.name) for one in found.strategies}
        tuning = {**asdict(found.tuning), "losses": losses, "at_end": found.tuning.at_end, "best_of": best}
    return {
        "against": found.against,
        "strategies": strategies,
        "verdicts": [{**asdict(one), "sentence": one.sentence()} for one in found.verdicts],
        "domains": {domain: [asdict(one) for one in verdicts] for domain, verdicts in found.domains.items()},
        "learning_rate": found.learning_rate,
        "tuning": tuning,
        "left_out": [asdict(one) for one in found.left],
        "notes": found.notes,
    }
