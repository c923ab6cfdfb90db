"""The driver of a sweep: hands runs to an engine, tries failed ones again, keeps the table, says how it goes.

It remembers nothing that the run folders do not say: whatever ends it, the next start reads them and goes on.
"""

import signal
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from himoe import run_folder
from himoe.errors import ConfigError, RunFolderError, RunInUseError
from himoe.files import write_json
from himoe.sweep.checks import check_runs
from himoe.sweep.early_stop import Halving, import_optuna
from himoe.sweep.engines import EngineOptions, open_pool
from himoe.sweep.execution import IN_USE, TRAIN, Outcome, Task, check_is_the_same, record_failure
from himoe.sweep.expand import Run, expand
from himoe.sweep.pool import Pool
from himoe.sweep.progress import SweepProgress
from himoe.sweep.spec import Spec
from himoe.sweep.status import ENDED, FAILED, RUNNING, status_of
from himoe.sweep.table import Table
from himoe.train.interrupt import StopRequest

RUNS = "runs"
WAIT_SECONDS = 2.0
"""Between two looks at a run that another process is at."""
TABLE_SHARE = 0.02
"""Most of the time that may go into writing the table while runs go on."""


@dataclass
class SweepResult:
    """What a sweep came to.

    Attributes:
        out: the folder of the sweep.
        runs: its runs, in the order of the spec.
        status: by run, as in the table.
        errors: of failed runs, in one line each, by run.
    """

    out: Path
    runs: list[Run]
    status: dict[str, str]
    errors: dict[str, str] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    """What was done now, in the order in which it ended, failed tries too."""

    @property
    def counts(self) -> Counter[str]:
        """Return how many runs have each status."""
        return Counter(self.status.values())


def run_sweep(
    spec: Spec | Mapping[str, Any] | str | Path,
    out: Path,
    *,
    workers: int = 1,
    engine: str = "local",
    retries: int = 1,
    early_stop: str | None = None,
    options: EngineOptions | None = None,
    runner: str = TRAIN,
    console: Console | None = None,
) -> SweepResult:
    """Do all runs of a sweep that have not ended yet, keep `out/runs.parquet`, and return what became of them.

    Args:
        spec: what `expand` takes.
        out: the folder of the sweep; `out/runs/ID` are ordinary run folders. Several sweeps may share one.
        workers: runs at a time.
        engine: "local", "ray" or "slurm".
        retries: how often a failed run is tried again before it is reported.
        early_stop: "asha", or None.
        options: of the engine.
        runner: `"package.module:function"` to fill a run folder with, in place of training; given the configuration,
            the folder, which holds config.json, and `prune`.
        console: where progress goes; standard error when None.

    Raises:
        HimoeError: before anything has started, for a spec, configuration, text or engine that cannot be used.
        KeyboardInterrupt: after Ctrl-C, once the running runs are saved.
    """
    console = console or Console(stderr=True)
    runs = expand(spec)
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"{out} is a file; a sweep needs a folder: choose another with --out")
    table = Table(out)
    halving = _halving(early_stop, runs, out)
    options = options or EngineOptions()
    threads = options.threads_of(engine, workers)
    for run in runs:
        check_is_the_same(out / RUNS / run.id, run.config)
    open_runs = [run for run in runs if status_of(out / RUNS / run.id) not in ENDED]
    if open_runs and runner == TRAIN:
        check_runs(open_runs, console)
    (out / RUNS).mkdir(parents=True, exist_ok=True)
    todo = [_task(run, out, runner, halving, threads) for run in open_runs]
    driver = _Driver(table, todo, retries, {run.id: run.name for run in runs})
    if todo:
        pool = open_pool(engine, min(workers, len(todo)), threads, out, runner, options)
        try:
            with SweepProgress(console, total=len(runs), done=len(runs) - len(todo)) as progress:
                driver.drive(pool, progress)
        finally:
            table.read().write()
    else:
        table.read().write()
    status = {run.id: status_of(out / RUNS / run.id) or RUNNING for run in runs}
    return SweepResult(out, runs, status, driver.errors, driver.outcomes)


def _task(run: Run, out: Path, runner: str, halving: Halving | None, threads: int) -> Task:
    config = run.config
    if config.train.threads is None:
        config = config.model_copy(update={"train": config.train.model_copy(update={"threads": threads})})
    folder = (out / RUNS / run.id).absolute()
    return Task(run.id, str(folder), config.model_dump(mode="json"), runner, halving.as_dict() if halving else None)


def _halving(early_stop: str | None, runs: Sequence[Run], out: Path) -> Halving | None:
    if early_stop is None:
        return None
    if early_stop != "asha":
        raise ConfigError(f"--early-stop {early_stop}: must be asha")
    import_optuna()
    for key, values in {
        "data": [run.config.data for run in runs],
        "train.seq_len": [run.config.train.seq_len for run in runs],
    }.items():
        if any(value != values[0] for value in values):
            raise ConfigError(
                f"--early-stop compares cross-entropies, which needs equal {key} in all runs; leave it out"
            )
    first = min(run.config.train.eval_every for run in runs)
    return Halving(str((out / RUNS).absolute()), [run.id for run in runs], first)


class _Driver:
    """Runs tasks on a pool until every one has ended, or failed too often."""

    def __init__(self, table: Table, tasks: Sequence[Task], retries: int, names: Mapping[str, str]) -> None:
        self._table, self._retries, self._names = table, retries, names
        self._tasks = {task.id: task for task in tasks}
        self._waiting = deque(task.id for task in tasks)
        self._elsewhere: dict[str, float] = {}
        self._running: set[str] = set()
        self._failures: Counter[str] = Counter()
        self._written = 0.0
        self.errors: dict[str, str] = {}
        self.outcomes: list[Outcome] = []

    def drive(self, pool: Pool, progress: SweepProgress) -> None:
        """Run all tasks. Raises KeyboardInterrupt after Ctrl-C: once what runs is saved, at once after a second one."""
        try:
            # SIGINT alone: SIGTERM ends the driver at once; then workers end by themselves, and jobs of Slurm go on
            with StopRequest([signal.SIGINT]) as stop:
                while not stop.requested and (self._waiting or self._elsewhere or self._running):
                    self._hand_out(pool)
                    progress.show(running=len(self._running), elsewhere=len(self._elsewhere))
                    if outcome := pool.next(timeout=0.5):
                        self._take(outcome, progress)
                    self._keep_table()
                if stop.requested:
                    progress.say("stopping: what runs is saved at its next step (Ctrl-C again: end at once)")
                else:
                    progress.show(running=0, elsewhere=0)
                pool.end()
        except BaseException:  # a second Ctrl-C too
            pool.kill()
            raise
        if stop.requested:
            raise KeyboardInterrupt

    def _hand_out(self, pool: Pool) -> None:
        now = time.monotonic()
        for id in [id for id, when in self._elsewhere.items() if when <= now]:
            del self._elsewhere[id]
            self._waiting.append(id)
        while self._waiting and pool.room() > 0:
            id = self._waiting.popleft()
            pool.submit(self._tasks[id])
            self._running.add(id)

    def _take(self, outcome: Outcome, progress: SweepProgress) -> None:
        id = outcome.id
        self._running.discard(id)
        self.outcomes.append(outcome)
        if outcome.status == IN_USE:
            self._elsewhere[id] = time.monotonic() + WAIT_SECONDS
        elif outcome.status == FAILED:
            self._failures[id] += 1
            if self._failures[id] > self._retries or outcome.hopeless:
                self._give_up(id, outcome.error)
                progress.failed(self._names[id], outcome.error)
            else:
                self._waiting.appendleft(id)
                progress.say(f"{self._names[id]}: {outcome.error}; trying again")
        elif outcome.status in ENDED:
            progress.done()
        else:  # its worker was told to stop, or ended before it began
            self._waiting.append(id)

    def _give_up(self, id: str, error: str) -> None:
        """Leave word in the folder of a run whose worker died, which could not."""
        self.errors[id] = error
        task, folder = self._tasks[id], Path(self._tasks[id].folder)
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(RunInUseError), run_folder.locked(folder):  # in use: another driver is at it already
            if not run_folder.is_run_folder(folder):
                write_json(folder / "config.json", task.config)
            if status_of(folder) == RUNNING:
                record_failure(folder, error)

    def _keep_table(self) -> None:
        started = time.monotonic()
        if started < self._written:
            return
        self._table.read().write()
        now = time.monotonic()
        self._written = now + max(5.0, (now - started) / TABLE_SHARE)
