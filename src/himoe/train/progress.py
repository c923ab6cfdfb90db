"""What a person sees while training: a live bar on a terminal, now and then a plain line anywhere else."""

from collections.abc import Sequence
from time import perf_counter
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn

PLAIN_SECONDS = 10.0
"""Least time between two plain lines."""


class LiveBar:
    """A bar on a terminal and nothing elsewhere, while it is entered; and lines above it.

    Args:
        console: where to write.
        columns: of the bar.
        total: how much there is to do.
        done: how much of it was done before.
    """

    def __init__(self, console: Console, columns: Sequence[ProgressColumn], *, total: int, done: int) -> None:
        self._console, self._bar = console, None
        if console.is_terminal:
            self._bar = Progress(*columns, console=console, refresh_per_second=2)
            self._task = self._bar.add_task("starting", total=total, completed=done)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class TrainingProgress(LiveBar):
    """Shows the last training line: step, loss, tokens/s, MaxVio and time left.

    Args:
        console: where to write; a terminal gets a live bar.
        steps: of the whole run.
        done: steps already done when this process starts.
    """

    def __init__(self, console: Console, *, steps: int, done: int = 0) -> None:
        columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"))
        super().__init__(console, columns, total=steps, done=done)
        self._steps, self._first = steps, done
        self._started = perf_counter()
        self._last_plain = -PLAIN_SECONDS

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def show(self, line: dict[str, Any]) -> None:
        """Show a training line of metrics.jsonl."""
        text = self.describe(line)
        if self._bar:
            self._bar.update(self._task, description=text, completed=line["step"])
            return
        now = perf_counter() - self._started
        if now - self._last_plain >= PLAIN_SECONDS or line["step"] == self._steps:
            self._last_plain = now
            self.say(f"step {line['step']}/{self._steps} · {text}")

    def describe(self, line: dict[str, Any]) -> str:
        """Return the line's numbers and the time left as text."""
        step = line["step"]
        seconds = (perf_counter() - self._started) / max(1, step - self._first) * (self._steps - step)
        parts = [f"loss {line['loss']:.3f}", f"{line['tokens_per_second']:,.0f} tokens/s"]
        if line["max_vio"] is not None:
            parts.append(f"MaxVio {line['max_vio']:.2f}")
        return " · ".join([*parts, f"{int(seconds) // 60}:{int(seconds) % 60:02} left"])
