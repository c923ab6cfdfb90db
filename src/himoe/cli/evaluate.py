"""`himoe eval`: a trained model on its held-out text, or on other text."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional

from himoe.cli.folders import existing_run
from himoe.cli.parsing import Verb, option
from himoe.cli.tables import print_domains


@dataclass(kw_only=True)
class Eval(Verb):
    """Score a run's model on each domain, in bits per byte and perplexity.

    Examples:
      himoe eval runs/novels
          the last checkpoint on the text that training held out
      himoe eval runs/novels --data letters/
          the same model on other text, all of it
      himoe eval runs/novels --checkpoint step-00000200 --json
          an earlier checkpoint, as JSON for a program
    """

    run_folder: Annotated[Positional[Path | None], option("RUN")] = None
    """Run folder that `himoe train` wrote."""
    data: Annotated[Path | None, option("PATH")] = None
    """Text file or folder. Without it: the held-out parts of the run's own text."""
    checkpoint: Annotated[str | None, option("NAME")] = None
    """Folder under RUN/checkpoints. Without it: the last one."""

    def run(self, command: list[str]) -> int:  # noqa: ARG002
        """Evaluate, and print the table of domains."""
        run = existing_run(self.run_folder)
        from himoe.trained import evaluate

        console = Console(stderr=self.as_json)
        result = evaluate(run, data=self.data, checkpoint=self.checkpoint, console=console)
        if self.as_json:
            print(json.dumps(result))
        else:
            print_domains(console, result)
        return 0
