"""What a sweep runs: the same training as `himoe train`. Importing this loads PyTorch, which warm workers do once."""

import sys
from pathlib import Path

from rich.console import Console

from himoe import run
from himoe.config import Config
from himoe.train.fit import Prune


def train(config: Config, folder: Path, prune: Prune | None = None) -> None:
    """Train, or go on with, the run in `folder`, which holds its config.json; prints to standard error."""
    run.train(config, out=folder, resume=True, console=Console(file=sys.stderr, width=120), prune=prune)
