"""`himoe train`: from a recipe or a file to a trained model in a run folder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import Positional, UseAppendAction

from himoe.cli.folders import existing_run, new_folder, newest_unfinished
from himoe.cli.parsing import Verb, option
from himoe.cli.tables import print_summary
from himoe.config import Config, format_document, load_config
from himoe.config.loading import parse_sets
from himoe.errors import ConfigError
from himoe.run_folder import ALARM, INTERRUPTED, run_of

EXIT = {INTERRUPTED: 130, ALARM: 3}
"""Exit status of a run that did not come to its end."""


@dataclass(kw_only=True)
class Train(Verb):
    """Train a language model; its run folder holds all there is to know.

    Examples:
      himoe train
          the default recipe on text this machine already has, about 5 minutes
      himoe train lm_tiny --data novels/ --out runs/novels
          another recipe, your own text: sub-folders or files are domains
      himoe train --set train.steps=1000 --set moe.preset=moge
          two values changed (docs/configuration.md explains every key)
      himoe train my.toml --dry-run
          show the configuration that a file leads to, and write nothing
      himoe train --resume
          go on with the newest unfinished run
      himoe train --resume --out runs/novels --set train.accumulate=4
          go on with one value changed that leaves the results alone
      himoe train --init-from runs/novels --data letters/ --out runs/letters
          start from a trained model and its tokenizer, on other text
      himoe train my.toml --find-learning-rate
          try rising learning rates for 100 steps and suggest one
    """

    recipe: Annotated[Positional[str | None], option("[RECIPE | FILE.toml]")] = None
    """A recipe's name (see `himoe list recipes`), a TOML file, or the config.json of a run.
    Without it: the configuration of the run at --init-from, or lm_demo."""
    data: Annotated[Path | None, option("PATH")] = None
    """What to learn: any text that `himoe prepare` reads, or a folder that it wrote. Without it: what the recipe says,
    or text that comes with Python."""
    out: Annotated[Path | None, option("DIR")] = None
    """Run folder to write. Without it: runs/NAME-DATE-TIME."""
    changes: Annotated[UseAppendAction[tuple[str, ...]], option("KEY=VALUE", "set")] = ()
    """Change one value of the configuration; may be given often. The word none switches an option off."""
    seed: Annotated[int | None, option("N")] = None
    """Decides the initial weights, the training order and all noise. Without it: what the recipe says."""
    init_from: Annotated[Path | None, option("RUN")] = None
    """Start from the weights and the tokenizer of a run, or of one of its checkpoints."""
    resume: Annotated[bool, option()] = False
    """Go on from the last checkpoint of the run at --out, or else of the newest unfinished run."""
    force: Annotated[bool, option()] = False
    """Overwrite the run folder if it exists."""
    allow_non_causal: Annotated[bool, option()] = False
    """Train although later tokens can change the routing of earlier ones, so that the loss is too good."""
    profile: Annotated[bool, option()] = False
    """Record a few steps in profile/ of the run folder: a trace, and the operations that take the time."""
    find_learning_rate: Annotated[bool, option()] = False
    """Train with a rising learning rate until it breaks, suggest one, and write nothing."""
    dry_run: Annotated[bool, option()] = False
    """Print the resolved configuration and write nothing. Refuses what building the model refuses, such as options that
    a part does not have; text, tokenizer, a run to start from, and your own experts at work are not looked at."""

    def run(self, command: list[str]) -> int:
        """Train, and print the closing tables.

        Returns 0 for a run that came to its end, 130 where Ctrl-C and 3 where an alarm stopped it at a checkpoint.
        """
        config, out = self._resumed() if self.resume else self._new()
        if self.find_learning_rate:
            self._refuse_what_a_search_ignores()
        if self.dry_run:
            from himoe.build import check_model

            check_model(config)
            print(json.dumps(config.model_dump(mode="json")) if self.as_json else format_document(config.model_dump()))
            return 0
        console = Console(stderr=self.as_json)
        if self.find_learning_rate:
            return self._find_learning_rate(config, console)
        from himoe.run import train

        summary = train(
            config,
            out=out,
            resume=self.resume,
            force=self.force,
            profile=self.profile,
            command=command,
            console=console,
        )
        if self.as_json:
            print(json.dumps({"run": str(out), **summary}))
        else:
            print_summary(console, summary, out)
        return EXIT.get(summary["status"], 0)

    def _new(self) -> tuple[Config, Path]:
        overrides: dict[str, Any] = {} if self.seed is None else {"seed": self.seed}
        if self.data:
            overrides["data"] = {"path": str(self.data), "sources": None}
        if self.allow_non_causal:
            overrides["moe"] = {"allow_non_causal": True}
        if self.init_from:
            overrides["train"] = {"init_from": str(self.init_from)}
        source = self.recipe
        if source is None and self.init_from:
            source = str(run_of(self.init_from) / "config.json")
        config = load_config(source, sets=self.changes, overrides=overrides)
        return config, self.out or new_folder(config.name)

    def _resumed(self) -> tuple[Config, Path]:
        given = {
            "a recipe": self.recipe,
            "--data": self.data,
            "--seed": self.seed is not None,
            "--init-from": self.init_from,
            "--force": self.force,
            "--find-learning-rate": self.find_learning_rate,
        }
        if clash := [name for name, value in given.items() if value]:
            raise ConfigError(
                f"--resume goes on with what stands in the run folder; leave {' and '.join(clash)} out, or start a new "
                "run"
            )
        run = existing_run(self.out) if self.out else newest_unfinished()
        stored = run / "config.json"
        overrides = _kept_weights(stored, self.changes)
        if self.allow_non_causal:
            overrides["moe"] = {"allow_non_causal": True}
        return load_config(stored, sets=self.changes, overrides=overrides), run

    def _refuse_what_a_search_ignores(self) -> None:
        given = {"--out": self.out, "--force": self.force, "--profile": self.profile}
        if clash := [name for name, value in given.items() if value]:
            raise ConfigError(
                f"--find-learning-rate writes no run folder; leave {' and '.join(clash)} out, or train without it"
            )

    def _find_learning_rate(self, config: Config, console: Console) -> int:
        from himoe.run import range_test

        found = range_test(config, console=console)
        print(json.dumps(found.as_dict()) if self.as_json else found)
        return 0


def _kept_weights(stored: Path, changes: Sequence[str]) -> dict[str, Any]:
    """Return the stored `data.weights` unless the changes name others: text that has moved is mixed as before."""
    weights = load_config(stored).data.weights
    given = parse_sets(changes).get("data")
    if weights is None or not isinstance(given, dict) or "weights" in given:
        return {}
    return {"data": {"weights": weights}}
