"""`himoe train`: from a recipe or a file to a trained model in a run folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, UseAppendAction

from himoe.cli.folders import existing_run, new_folder, newest_unfinished
from himoe.cli.parsing import Verb, option
from himoe.cli.tables import print_summary
from himoe.config import Config, format_document, load_config
from himoe.errors import ConfigError


@dataclass(kw_only=True)
class Train(Verb):
    """Train a language model; its run folder holds all that is known of it.

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
    """

    recipe: Annotated[Positional[str | None], option("[RECIPE | FILE.toml]")] = None
    """A recipe's name (see `himoe list recipes`), a TOML file, or the config.json of a run. Without it: lm_demo."""
    data: Annotated[Path | None, option("PATH")] = None
    """Text file or folder to learn. Without it: what the recipe says, or text that comes with Python."""
    out: Annotated[Path | None, option("DIR")] = None
    """Run folder to write. Without it: runs/NAME-DATE-TIME."""
    changes: Annotated[UseAppendAction[tuple[str, ...]], option("KEY=VALUE", "set")] = ()
    """Change one value of the configuration; may be given often. The word none switches an option off."""
    resume: Annotated[bool, option()] = False
    """Go on from the last checkpoint of the run at --out, or else of the newest unfinished run."""
    force: Annotated[bool, option()] = False
    """Overwrite the run folder if it exists."""
    dry_run: Annotated[bool, option()] = False
    """Print the resolved configuration and write nothing."""

    def run(self, command: list[str]) -> int:
        """Train, and print the closing tables; 130 where Ctrl-C stopped the run at a checkpoint."""
        config, out = self._resumed() if self.resume else self._new()
        if self.dry_run:
            print(json.dumps(config.model_dump(mode="json")) if self.as_json else format_document(config.model_dump()))
            return 0
        from himoe.run import train

        console = Console(stderr=self.as_json)
        summary = train(config, out=out, resume=self.resume, force=self.force, command=command, console=console)
        if self.as_json:
            print(json.dumps({"run": str(out), **summary}))
        else:
            print_summary(console, summary, out)
        return 130 if summary["status"] == "interrupted" else 0

    def _new(self) -> tuple[Config, Path]:
        overrides = {"data": {"path": str(self.data)}} if self.data else {}
        config = load_config(self.recipe, sets=self.changes, overrides=overrides)
        return config, self.out or new_folder(config.name)

    def _resumed(self) -> tuple[Config, Path]:
        given = {"a recipe": self.recipe, "--data": self.data, "--set": self.changes, "--force": self.force}
        if clash := [name for name, value in given.items() if value]:
            raise ConfigError(
                f"--resume takes everything from the run folder; leave {' and '.join(clash)} out, or start a new run"
            )
        run = existing_run(self.out) if self.out else newest_unfinished()
        return load_config(run / "config.json"), run
