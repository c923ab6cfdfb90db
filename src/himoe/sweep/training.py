"""What a sweep runs: the same training as `himoe train`. Importing this loads PyTorch, which warm workers do once."""

import sys
from pathlib import Path

import torch._dynamo  # noqa: F401 - seconds that the first optimizer would take in its run
from rich.console import Console

from himoe import run
from himoe.config import Config
from himoe.train.fit import Prune


def train(config: Config, folder: Path, prune: Prune | None = None) -> None:
    """Train, or go on with, the run in `folder`, which is locked and holds its config.json; prints to standard error.

    Without report.html, which is of 5 MB: `himoe report` writes it for those that somebody looks at.
    """
    console = Console(file=sys.stderr, width=120)
    run.train(config, out=folder, resume=True, console=console, held=True, report=False, prune=prune)
