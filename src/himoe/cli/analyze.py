"""`himoe analyze`: what a sweep says, as tables and one page.

A verb of its own and no part of `himoe sweep`: it reads tables alone, also those of a comparison or from elsewhere, and
needs neither torch nor what runs a sweep.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import Positional, UseAppendAction

from himoe.cli.parsing import Verb, option
from himoe.errors import ConfigError


@dataclass(kw_only=True)
class Analyze(Verb):
    """Say what a sweep found: means with intervals, plots, a fitted law.

    Examples:
      himoe analyze sweeps/experts
          prints the tables and writes sweeps/experts/analysis.html
      himoe analyze sweeps/experts --where moe.preset=switch
          only some of the runs
      himoe analyze sweeps/experts --tokens 1M
          every run as it stood after a million tokens, from its curve
    """

    sweep: Annotated[Positional[Path | None], option("DIR")] = None
    """Folder of a sweep, or its runs.parquet."""
    where: Annotated[UseAppendAction[tuple[str, ...]], option("COLUMN=VALUE")] = ()
    """Keep the runs in which a column of the table is this; may be given often."""
    tokens: Annotated[str | None, option("N")] = None
    """Compare at equal tokens, such as 1M, along the learning curves. Without it: at the end of the runs. A learning
    rate that falls to the end makes a loss on the way higher than that of a run which ended there."""
    flops: Annotated[str | None, option("N")] = None
    """Compare at equal training FLOPs, such as 1e15, likewise."""
    out: Annotated[Path | None, option("FILE")] = None
    """Page to write. Without it: DIR/analysis.html."""
    replicates: Annotated[int, option("N")] = 400
    """Of the bootstrap behind the law's intervals."""

    def run(self, command: list[str]) -> int:  # noqa: ARG002
        """Analyse, write the page, and print."""
        from himoe.analysis import compare_at, read_sweep, study, where, write_page
        from himoe.cli.analysis_tables import print_study

        if self.sweep is None:
            raise ConfigError("name the folder of a sweep, such as himoe analyze sweeps/experts")
        if self.tokens and self.flops:
            raise ConfigError("--tokens and --flops are two ways to compare; give one of them")
        if self.replicates < 40:
            raise ConfigError(f"--replicates is {self.replicates}; an interval of 95 % takes 40 or more")
        sweep = where(read_sweep(self.sweep), self.where) if self.where else read_sweep(self.sweep)
        if self.tokens or self.flops:
            sweep = compare_at(sweep, tokens=amount("--tokens", self.tokens), flops=amount("--flops", self.flops))
        found = study(sweep, replicates=self.replicates)
        folder = self.sweep if self.sweep.is_dir() else self.sweep.parent
        page = write_page(found, self.out or folder / "analysis.html")
        if self.as_json:
            print(json.dumps({**_document(found), "report": str(page)}))
        else:
            print_study(Console(), found, str(page))
        return 0


def amount(name: str, text: str | None) -> float | None:
    """Return an amount such as 50M or 1e15, None for none."""
    if text is None:
        return None
    from himoe.plan.search import parse_amount

    if (found := parse_amount(text)) is None:
        raise ConfigError(f"{name} is {text!r}; it must be a number above 0, such as 50M, 7B or 1e15")
    return found


def _document(found: Any) -> dict[str, Any]:
    """Return a study as one tree."""
    from himoe.analysis.settings import Mean
    from himoe.analysis.study import formula

    def plain(mean: Mean | None) -> dict[str, Any] | None:
        return None if mean is None else asdict(mean)

    settings = [
        {
            "name": one.name,
            "values": one.values,
            "runs": [row["run"] for row in one.runs],
            "tokens": one.tokens,
            **{name: plain(getattr(one, name)) for name in ("loss", "paired", "bits_per_byte", "cv", "max_vio")},
        }
        for one in found.settings
    ]
    law = None
    if found.fitted is not None:
        ensemble, form = found.fitted.ensemble, found.fitted.ensemble.law.form
        names = [name for name in form.terms if ensemble.parameter(name) is not None]
        law = {
            "formula": formula(found.fitted),
            "parameters": {
                n: {"value": float(ensemble.law.value(n)), "interval": ensemble.parameter(n)} for n in names
            },
            "left_out": form.left_out,
            "held_out": [{k: v for k, v in asdict(one).items() if k != "predicted"} for one in found.fitted.held_out],
            "residuals": dict(
                zip((one.name for one in found.fitted.settings), ensemble.law.residuals.tolist(), strict=True)
            ),
            "variant": dict(found.fitted.variant),
        }
    left = [asdict(one) for one in found.left]
    return {"name": found.sweep.name, "at": found.sweep.at, "settings": settings, "left_out": left, "law": law,
            "no_law": found.no_law}  # fmt: skip
