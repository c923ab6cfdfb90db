"""Worker processes on this machine, each warm and pinned to cores of its own.

A worker is a fresh interpreter that is spoken to through its standard input and output. Their ends close with the
driver, however it ends, and with that every worker ends by itself.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import IO, Any

from himoe.errors import ConfigError, HimoeError
from himoe.sweep.execution import TRAIN, Outcome, Task
from himoe.sweep.pool import FRUITLESS_STARTS
from himoe.sweep.status import FAILED, RUNNING

OUT_OF_MEMORY = "perhaps for lack of memory: give fewer --workers, or make the model smaller"


class Workers:
    """A pool of processes.

    Args:
        number: of workers.
        cores: those to use; workers share them where there are not enough.
        each: cores of a worker.
        gpus: of a worker, also a part of one; 0: all that are visible.
        runner: what the tasks will run, loaded once.
    """

    def __init__(self, number: int, cores: list[int], each: int = 1, gpus: float = 0.0, runner: str = TRAIN) -> None:
        self._events: SimpleQueue[tuple[_Worker, dict[str, Any] | None]] = SimpleQueue()
        each = min(each, len(cores))
        parts = [[cores[(i * each + j) % len(cores)] for j in range(each)] for i in range(number)]
        self._runner, self._fruitless = runner, 0
        devices = [devices_of(i, gpus) for i in range(number)]
        pairs = zip(parts, devices, strict=True)
        self._workers = [_Worker(part, device, runner, self._events) for part, device in pairs]

    def room(self) -> int:
        """Return how many workers have no task."""
        return sum(worker.task is None for worker in self._workers)

    def submit(self, task: Task) -> None:
        """Give a task to a worker that has none."""
        next(worker for worker in self._workers if worker.task is None).start(task)

    def next(self, timeout: float) -> Outcome | None:
        """Return the next outcome, None when there was none; see `Pool`."""
        try:
            worker, message = self._events.get(timeout=timeout)
        except Empty:
            return None
        if message is None:
            return self._replace(worker)
        self._fruitless = 0
        if "ready" in message:
            return None
        worker.task = None
        return Outcome(**message)

    def _replace(self, worker: "_Worker") -> Outcome | None:
        """Put a new worker in the place of one that has ended, and return the outcome of its task, if it had one."""
        self._fruitless += not worker.ready
        if self._fruitless >= FRUITLESS_STARTS:
            raise HimoeError(f"workers end before they are ready: {worker.last_words()}")
        new = _Worker(worker.cores, worker.devices, self._runner, self._events)
        self._workers[self._workers.index(worker)] = new
        cause = worker.cause()
        worker.close()
        if worker.task is None:
            return None
        return Outcome(worker.task.id, FAILED, cause) if worker.ready else Outcome(worker.task.id, RUNNING)

    def end(self) -> None:
        """Close what workers read: they save and end."""
        for worker in self._workers:
            worker.release()
        for worker in self._workers:
            worker.close()

    def kill(self) -> None:
        """End all workers at once."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.close()


class _Worker:
    """One process, and the thread that hands on what it says; None stands for its end."""

    task: Task | None = None
    ready = False

    def __init__(
        self,
        cores: list[int],
        devices: str | None,
        runner: str,
        events: "SimpleQueue[tuple[_Worker, dict[str, Any] | None]]",
    ) -> None:
        self.cores, self.devices = cores, devices
        self._events, self._errors = events, tempfile.TemporaryFile()  # noqa: SIM115 - as long as the worker
        environment = {
            "OMP_NUM_THREADS": str(len(cores)),
            "GOMP_SPINCOUNT": "1000",
            **os.environ,
            **({} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}),
            "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "himoe.sweep.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            process_group=0 if os.name == "posix" else None,  # so that Ctrl-C at the terminal meets the driver alone
            text=True,
        )
        self._say({"cores": cores, "runner": runner})
        self._listener = Thread(target=self._listen, daemon=True)
        self._listener.start()

    def start(self, task: Task) -> None:
        self.task = task
        self._say(task.as_dict())

    def _say(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with suppress(OSError):  # it has ended, which its standard output tells too
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def _listen(self) -> None:
        stream: IO[str] | None = self.process.stdout
        assert stream is not None
        for line in stream:
            message = json.loads(line)
            self.ready = True
            self._events.put((self, message))
        self.process.wait()
        self._events.put((self, None))

    def release(self) -> None:
        """Close its standard input: it saves and ends."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()

    def close(self) -> None:
        """Wait for its end, and close what it was spoken to through."""
        self.release()
        self.process.wait()
        self._listener.join()
        self._errors.close()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def cause(self) -> str:
        """Return why the process has ended, in one line."""
        code = self.process.wait()
        if code >= 0:
            return f"its worker ended with exit status {code}: {self.last_words()}"
        name = signal.Signals(-code).name
        hint = f", {OUT_OF_MEMORY}" if name == "SIGKILL" else ""
        return f"its worker was ended by {name}{hint}"

    def last_words(self) -> str:
        """Return the last line of what the process printed outside its runs."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no message")


def devices_of(worker: int, gpus: float) -> str | None:
    """Return what a worker gets as CUDA_VISIBLE_DEVICES, None to leave it as it is.

    >>> [devices_of(i, 0.5) for i in range(3)], devices_of(1, 2), devices_of(1, 0)
    (['0', '0', '1'], '2,3', None)
    """
    if not gpus:
        return None
    first = int(worker * gpus + 1e-6)
    numbers = range(first, first + max(1, math.ceil(gpus)))
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if visible and numbers[-1] >= len(visible):
        raise ConfigError(
            f"--gpus-per-run {gpus:g}: {worker + 1} workers need more than the {len(visible)} GPUs of "
            "CUDA_VISIBLE_DEVICES; lower one of the two"
        )
    return ",".join(visible[number] if visible else str(number) for number in numbers)
