"""Weights & Biases: offline in `RUN/wandb` unless `WANDB_MODE` says otherwise; `wandb sync` uploads it later."""

import os
from collections.abc import Mapping
from typing import Any

from himoe.train.writers.base import PROJECT, RunIdentity, flatten


class WandB:
    """One run of the project `himoe`; its id is the run's own, so a resumed process goes on with it."""

    def __init__(self, run: RunIdentity) -> None:
        os.environ.setdefault("WANDB_MODE", "offline")
        if os.environ["WANDB_MODE"] == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # which would use the network offline too

        import wandb  # pyright: ignore[reportMissingImports] - it reads these variables while it is imported

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.id,
            name=run.name,
            dir=run.folder,
            config=run.config,
            resume="allow",
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )
        self._run.define_metric("*", step_metric="step")  # its own step may not go back, ours does after a resume

    def log(self, line: Mapping[str, Any]) -> None:
        """Write the line's numbers."""
        self._run.log({"step": line["step"], **flatten(line)})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
