"""What a person sees while text is prepared: a bar on a terminal, now and then a plain line anywhere else."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

PLAIN_SECONDS = 10.0  # between two plain lines


@contextmanager
def preparing(console: Console) -> Iterator["PreparationProgress"]:
    """Show on `console` what a preparation does; gives what `prepare(progress=…)` takes."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[numbers]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield PreparationProgress(console, bar)


class PreparationProgress:
    """Shows stage, bytes, rate and time left; may be called by several threads."""

    def __init__(self, console: Console, bar: Progress) -> None:
        self._console, self._bar = console, bar
        self._task = bar.add_task("reading", total=None, numbers="")
        self._lock = threading.Lock()
        self._stage, self._first, self._began = "", 0, 0.0
        self._printed = monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take in what is being done, bytes done and bytes in all, 0 where that is not known."""
        with self._lock:
            now = monotonic()
            begins = stage != self._stage
            if begins:
                self._stage, self._first, self._began = stage, done, now
            numbers = self._numbers(done, total, now - self._began)
            if self._console.is_terminal:
                self._bar.update(
                    self._task, description=stage, completed=done, total=total or None, numbers=numbers, refresh=begins
                )
            elif now - self._printed >= PLAIN_SECONDS or (begins and stage.startswith("waiting")):
                self._printed = now
                self._console.print(f"{stage} {numbers}".rstrip(), highlight=False, markup=False, soft_wrap=True)

    def _numbers(self, done: int, total: int, seconds: float) -> str:
        """Return bytes, rate and time left as text; the rate is that of this stage."""
        if not total:
            return ""
        text = f"{format_bytes(done)} of {format_bytes(total)}"
        rate = (done - self._first) / seconds if seconds > 1 else 0
        if rate > 0:
            left = int((total - done) / rate)
            text += f" · {format_bytes(rate)}/s · {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        return text


def format_bytes(size: float) -> str:
    """Return a number of bytes for people.

    >>> [format_bytes(size) for size in (0, 999, 12_345, 2_500_000_000)]
    ['0 B', '999 B', '12.3 kB', '2.5 GB']
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
