"""`himoe check`: does a trained model keep a promise? One check so far, causality."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.markup import escape
from tyro.conf import Positional

from himoe.cli.folders import existing_run
from himoe.cli.parsing import Verb, option
from himoe.cli.tables import simple_table
from himoe.errors import ConfigError, nearest

CHECKS = ("causality",)
BROKEN = 1
"""Exit status of a check that did not hold."""


@dataclass(kw_only=True)
class Check(Verb):
    """Check that no later token changes what a run's model says earlier.

    Checks:
      causality
          later tokens of random texts are exchanged, and earlier logits
          compared in fp64, in training mode and in eval mode

    Exit status:
      0   the check holds
      1   it does not: what is not causal sees its future in training

    Examples:
      himoe check causality runs/novels
          the last checkpoint, 4 texts of 64 tokens, each cut at 5 places
      himoe check causality runs/novels --rows 8 --length 512
          more and longer texts: a rare leak needs many tokens to be seen
      himoe check causality runs/novels --json
          every number, as JSON for a program
    """

    check: Annotated[Positional[str | None], option("CHECK")] = None
    """What to check: causality."""
    run_folder: Annotated[Positional[Path | None], option("RUN")] = None
    """Run folder that `himoe train` wrote."""
    checkpoint: Annotated[str | None, option("NAME")] = None
    """Folder under RUN/checkpoints, or best, or last. Without it: the last one."""
    rows: Annotated[int, option("N")] = 4
    """Texts of the batch. Without it: 4."""
    length: Annotated[int, option("N")] = 64
    """Tokens of a text. Without it: 64."""
    seed: Annotated[int, option("N")] = 0
    """Decides the texts, the exchanged tokens and the noise. Without it: 0."""

    def run(self, command: list[str]) -> int:  # noqa: ARG002
        """Check, print the table, and return 0 or 1."""
        if self.check not in CHECKS:
            given = "name a check" if self.check is None else f"no check {self.check!r}"
            raise ConfigError(f"{given}; known: {', '.join(CHECKS)}{nearest(self.check or '', CHECKS)}")
        if self.rows < 1 or self.length < 2:
            raise ConfigError(f"--rows is {self.rows} and --length {self.length}; they must be at least 1 and 2")
        run = existing_run(self.run_folder)
        console = Console(stderr=self.as_json)
        found = self._causality(run, console)
        if self.as_json:
            print(json.dumps(found))
        else:
            _print(console, found)
        return 0 if found["causal"] else BROKEN

    def _causality(self, run: Path, console: Console) -> dict[str, Any]:
        """Return what the suffix test found, layers by their numbers."""
        import torch

        from himoe.nn import MoE
        from himoe.testing.causality import suffix_test
        from himoe.trained import load_run

        loaded = load_run(run, self.checkpoint)
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.rows, self.length)
        texts = torch.randint(loaded.tokenizer.vocab_size, shape, generator=generator)
        device = next(loaded.model.parameters()).device
        with console.status("checking") as status:

            def progress(done: float) -> None:
                status.update(f"checking {done:.0%}")

            test = suffix_test(loaded.model, texts.to(device), seed=self.seed, progress=progress)
        names = [name for name, module in loaded.model.named_modules() if isinstance(module, MoE)]
        number = dict(zip(names, loaded.model.moe_layer_indices(), strict=True))
        suffixes = [asdict(suffix) for suffix in test.suffixes]
        return {
            "check": "causality",
            "run": str(run),
            "checkpoint": loaded.checkpoint.name,
            "step": loaded.step,
            "causal": test.causal,
            "rows": test.rows,
            "length": test.length,
            "tolerance": test.tolerance,
            "labelled": dict(test.labelled),
            "suffixes": [{**suffix, "layer": number.get(suffix["layer"])} for suffix in suffixes],
        }


def _print(console: Console, found: Mapping[str, Any]) -> None:
    """Print a line for every cut, what the columns say, and the verdict."""
    about = f"{found['checkpoint']}, {found['rows']} texts of {found['length']} tokens"
    console.print(f"[bold]{escape(found['run'])}[/bold], {about}\n", highlight=False, soft_wrap=True)
    table = simple_table("mode", ["changed from", "earlier logits", "later logits", "first place", "layer"])
    for suffix in found["suffixes"]:
        leaks = suffix["row"] is not None
        layer = "–" if suffix["layer"] is None else f"{suffix['layer']}, {suffix['what']}"
        where = [str(suffix["position"]), layer] if leaks else ["", ""]
        table.add_row(
            suffix["mode"],
            str(suffix["cut"]),
            f"{suffix['change']:.1e}" if suffix["change"] else "0",
            f"{suffix['after']:.1e}",
            *where,
        )
    console.print(table)
    console.print("changed from: the first token that was exchanged; places count from 0.", style="dim")
    console.print(
        f"logits: largest change, as a share of the largest; up to {found['tolerance']:.0e} is rounding.",
        style="dim",
        highlight=False,
    )
    console.print()
    for name, reason in found["labelled"].items():
        console.print(f"{name} says it is not causal: {reason or 'without a reason'}.", highlight=False)
    console.print(_verdict(found), highlight=False)


def _verdict(found: Mapping[str, Any]) -> str:
    leaks = [suffix for suffix in found["suffixes"] if suffix["row"] is not None]
    if not leaks:
        return "[bold]causal[/bold]: no later token changed an earlier logit."
    modes = " and ".join(dict.fromkeys(suffix["mode"] for suffix in leaks))
    first = leaks[0]
    layer = "" if first["layer"] is None else f", first in layer {first['layer']}, whose {first['what']} changed"
    return (
        f"[bold]not causal[/bold] in {modes} mode: tokens from {first['cut']} on change what is said at "
        f"{first['position']}{layer}."
    )
