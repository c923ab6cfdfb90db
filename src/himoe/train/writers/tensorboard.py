"""TensorBoard: event files in `RUN/tensorboard`; look at them with `tensorboard --logdir runs`."""

from collections.abc import Mapping
from typing import Any

from himoe.train.writers.base import RunIdentity, flatten


class TensorBoard:
    """One scalar per number, and the text of alarms.

    A resumed run writes a new event file that hides what the earlier ones hold beyond the checkpoint.
    """

    def __init__(self, run: RunIdentity) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._events = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1 if run.step else None)

    def log(self, line: Mapping[str, Any]) -> None:
        """Write the line's numbers and make them readable at once."""
        for name, value in flatten(line).items():
            self._events.add_scalar(name, value, line["step"])
        if line.get("kind") == "alarm":
            self._events.add_text(f"alarm/{line['alarm']}", line["text"], line["step"])
        self._events.flush()

    def close(self) -> None:
        """Close the event file."""
        self._events.close()
