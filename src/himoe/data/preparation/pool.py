"""Worker processes: each runs the functions it is sent, one after the other, and reports how far it is.

Plain Python processes that speak over their pipes: they import neither the script that started them nor torch, end
when that process ends, however it ends, and one that dies is noticed at once.
"""

import contextlib
import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Self

from himoe.errors import DataError

Advance = Callable[[int], None]  # told of bytes done since the last time; may be called from any thread
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
ONE_THREAD["OPENBLAS_NUM_THREADS"] = "1"


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool:
    """Runs functions in `workers` processes, or in this one where there would be one only.

    The processes start when they are first needed and end with the `with` block.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._processes: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None  # one a process, which it talks to

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._processes:
            worker.process.kill()
        if self._threads:
            self._threads.shutdown(cancel_futures=True)
        for worker in self._processes:
            worker.close()

    def run(self, function: Callable[..., Any], tasks: Iterable[tuple], advance: Advance) -> Iterator[Any]:
        """Yield `function(*task, advance)` of every task, as they finish; `function` belongs to a module's top level.

        Raises what the function raises, and `DataError` where a process dies.
        """
        if self.workers < 2:
            for task in tasks:
                yield function(*task, advance)
            return
        threads = self._start()
        running: set[Future] = set()
        for task in tasks:
            running.add(threads.submit(self._call, function, task, advance))
            if len(running) > self.workers:  # one more waits, so that no process does
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)

    def _start(self) -> ThreadPoolExecutor:
        if self._threads is None:
            for _ in range(self.workers):
                self._processes.append(_Worker())
                self._idle.put(self._processes[-1])
            self._threads = ThreadPoolExecutor(self.workers)
        return self._threads

    def _call(self, function: Callable[..., Any], task: tuple, advance: Advance) -> Any:
        worker = self._idle.get()
        try:
            return worker.call(function, task, advance)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process and the pipes to it."""

    def __init__(self) -> None:
        path = os.pathsep.join(entry or str(os.curdir) for entry in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "himoe.data.preparation.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": path},
        )

    def close(self) -> None:
        """Take leave of a process that has ended."""
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # a question that it did not live to read
                if pipe:
                    pipe.close()

    def call(self, function: Callable[..., Any], task: tuple, advance: Advance) -> Any:
        """Have one task done; raises what it raised there."""
        assert self.process.stdin and self.process.stdout
        try:
            pickle.dump((function, task), self.process.stdin)
            self.process.stdin.flush()
            while True:
                kind, value = pickle.load(self.process.stdout)
                if kind != "advance":
                    break
                advance(value)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            status = self.process.wait()
            ended = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            raise DataError(
                f"a process that prepared the text {ended} (short of memory?); start again, finished parts are kept, "
                "with a lower data.workers if memory was short"
            ) from None
        if kind == "error":
            raise value
        return value
