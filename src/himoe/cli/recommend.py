"""`himoe recommend`: the best number and size of experts for a budget, from a sweep or from what is published."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import Positional, UseAppendAction

from himoe.cli.analyze import amount
from himoe.cli.parsing import Verb, option
from himoe.errors import ConfigError, DataError, HimoeError


@dataclass(kw_only=True)
class Recommend(Verb):
    """Say how many experts of which size suit a budget, and how surely.

    Examples:
      himoe recommend sweeps/experts --active 5M
          by the law fitted to a sweep, with intervals and what to run next
      himoe recommend sweeps/experts --flops 1e16 --total 200M
          active size and tokens too, within a memory
      himoe recommend --active 50M
          without a sweep: what is published, and by whom
    """

    sweep: Annotated[Positional[Path | None], option("[DIR]")] = None
    """Folder of a sweep. Without it: published findings."""
    active: Annotated[str | None, option("N")] = None
    """Active parameters, embeddings included, such as 50M. Without any budget: the largest size of the sweep."""
    total: Annotated[str | None, option("N")] = None
    """Total parameters at most."""
    flops: Annotated[str | None, option("N")] = None
    """Training FLOPs, divided between parameters and tokens unless one of them is given."""
    tokens: Annotated[str | None, option("N")] = None
    """Tokens to train on. Without it: what the FLOPs allow, else as in the sweep's longest runs."""
    where: Annotated[UseAppendAction[tuple[str, ...]], option("COLUMN=VALUE")] = ()
    """Keep the runs in which a column of the table is this; may be given often."""
    replicates: Annotated[int, option("N")] = 400
    """Of the bootstrap behind the intervals."""

    def run(self, command: list[str]) -> int:  # noqa: ARG002
        """Print the recommendation."""
        from himoe.analysis import Budget
        from himoe.analysis.published import published
        from himoe.cli.analysis_tables import print_published, print_recommendation

        names = ("active", "total", "flops", "tokens")
        budget = Budget(**{name: amount(f"--{name}", getattr(self, name)) for name in names})
        if self.sweep is None:
            if self.where:
                raise ConfigError("--where chooses runs of a sweep; name its folder first")
            said = published(budget)
            print(json.dumps(said)) if self.as_json else print_published(Console(), said)
            return 0
        if self.replicates < 40:
            raise ConfigError(f"--replicates is {self.replicates}; an interval of 95 % takes 40 or more")
        found = self._by_sweep(self.sweep, budget)
        print(json.dumps(found.document())) if self.as_json else print_recommendation(Console(), found)
        return 0

    def _by_sweep(self, folder: Path, budget: Any) -> Any:
        from himoe.analysis import read_sweep, recommend, study, where

        sweep = where(read_sweep(folder), self.where) if self.where else read_sweep(folder)
        found = study(sweep, replicates=self.replicates)
        if found.fitted is None:
            raise DataError(f"{sweep.name}: no recommendation, since {found.no_law}")
        return recommend(found.fitted, budget, sweep.name, num_groups=_groups(found.fitted.settings[0]))


def _groups(one: Any) -> int:
    """Return the number of groups that a grouped router's experts must divide into, 1 for others."""
    from himoe.config import load_config
    from himoe.registry import GROUPED_PRESETS, GROUPED_SELECTORS

    if one.fact("preset") not in GROUPED_PRESETS and one.fact("selector") not in GROUPED_SELECTORS:
        return 1
    if one.values.get("moe.num_groups"):
        return int(one.values["moe.num_groups"])
    try:
        return load_config(str(one.fact("recipe"))).moe.num_groups
    except HimoeError:  # a file of the user's own that is elsewhere
        return 1
