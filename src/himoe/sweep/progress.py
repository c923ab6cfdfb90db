"""What a person sees of a sweep: a live bar on a terminal, now and then a plain line anywhere else."""

from time import monotonic
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn

from himoe.train.progress import LiveBar

PLAIN_SECONDS = 30.0
"""Least time between two plain lines."""


class SweepProgress(LiveBar):
    """Counts runs that are done, failed, running and left, and says how long the rest will take.

    Args:
        console: where to write; a terminal gets a live bar.
        total: runs of the sweep.
        done: those that had ended before.
    """

    def __init__(self, console: Console, *, total: int, done: int) -> None:
        super().__init__(console, (BarColumn(), TextColumn("{task.description}")), total=total, done=done)
        self._total, self._before = total, done
        self._done = self._failed = self._running = self._elsewhere = 0
        self._last_plain = monotonic()
        self._first_end: float | None = None

    def __enter__(self) -> Self:
        if self._before:
            self.say(f"{self._before} of {self._total} runs have ended before")
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if not self._bar and kind is None:
            self.say(self.describe())

    def show(self, *, running: int, elsewhere: int) -> None:
        """Take note of how many runs go on, here and in other processes."""
        self._running, self._elsewhere = running, elsewhere
        if self._bar:
            self._bar.update(self._task, description=self.describe(), completed=self._ended)
        elif monotonic() - self._last_plain >= PLAIN_SECONDS:
            self._last_plain = monotonic()
            self.say(self.describe())

    def done(self) -> None:
        """Take note of a run that has ended."""
        self._done += 1
        self._first_end = self._first_end or monotonic()

    def failed(self, name: str, error: str) -> None:
        """Take note of a run that will not be tried again."""
        self._failed += 1
        self._first_end = self._first_end or monotonic()
        self.say(f"failed: {name}: {error}")

    @property
    def _ended(self) -> int:
        return self._before + self._done + self._failed

    def describe(self) -> str:
        """Return the numbers and the time left as text."""
        left = self._total - self._ended - self._running - self._elsewhere
        parts = [f"{self._before + self._done} done"]
        parts += [f"{self._failed} failed"] if self._failed else []
        parts += [f"{self._running} running"] if self._running else []
        parts += [f"{self._elsewhere} in use by another sweep"] if self._elsewhere else []
        parts += [f"{left} left"] if left else []
        ended, still_open = self._done + self._failed, self._total - self._ended
        if self._first_end and ended > 1 and still_open:  # from the first end on: workers had to get ready before it
            seconds = (monotonic() - self._first_end) / (ended - 1) * still_open
            parts.append(f"about {_time(seconds)} to go")
        return " · ".join(parts)


def _time(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes >= 2 else f"{int(seconds)} s"
