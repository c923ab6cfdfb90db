"""What an engine is to the driver: it takes tasks, and says how they went."""

from typing import Protocol

from himoe.sweep.execution import Outcome, Task

FRUITLESS_STARTS = 3
"""Workers in a row that end before they are ready: then something is wrong that another one will not mend."""


class Pool(Protocol):
    """Workers of some kind. A task handed in comes back as exactly one outcome, unless the pool is ended before."""

    def room(self) -> int:
        """Return how many tasks could start now."""
        ...

    def submit(self, task: Task) -> None:
        """Start a task; there must be room."""
        ...

    def next(self, timeout: float) -> Outcome | None:
        """Return the next outcome, None when there was none within so many seconds.

        A worker that has died in a run is replaced, and its run failed.
        """
        ...

    def end(self) -> None:
        """Let every running task save and stop, and wait for that."""
        ...

    def kill(self) -> None:
        """End everything at once."""
        ...
