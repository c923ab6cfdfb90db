"""Jobs of Slurm through submitit: runs that are started together are one array job, a process each.

Jobs outlive the driver: one that is started again finds their folders in use, and waits for them.
"""

import time
from pathlib import Path
from typing import Any

from himoe.errors import ConfigError, MissingExtraError
from himoe.sweep.engines import EngineOptions
from himoe.sweep.execution import Outcome, Task, describe, execute
from himoe.sweep.status import FAILED

ALL = 10**6


class SlurmJobs:
    """A pool of jobs.

    Args:
        number: of jobs at a time.
        threads: cores of each.
        folder: for submitit's files: scripts, and what the jobs printed.
        options: GPUs, what Slurm is told, and the executor.
    """

    def __init__(self, number: int, threads: int, folder: Path, options: EngineOptions) -> None:
        submitit = import_submitit()
        executor = options.executor or "slurm"
        if options.gpus_per_run % 1:
            raise ConfigError(
                f"--gpus-per-run {options.gpus_per_run:g}: Slurm gives whole GPUs; --engine ray shares them"
            )
        try:
            self._executor = submitit.AutoExecutor(folder=str(folder / "%j"), cluster=executor)
            self._executor.update_parameters(
                name="himoe",
                cpus_per_task=threads,
                **({"gpus_per_node": int(options.gpus_per_run)} if options.gpus_per_run else {}),
                **({"slurm_array_parallelism": number} if executor == "slurm" else {}),
                **dict(options.slurm),
            )
        except (RuntimeError, ValueError, NameError, TypeError, AssertionError) as error:
            raise ConfigError(f"--engine slurm: {describe(error)}") from None
        self._most = ALL if executor == "slurm" else number  # Slurm itself limits how many run, the others do not
        self._batch: list[Task] = []
        self._jobs: dict[str, tuple[Any, Task]] = {}

    def room(self) -> int:
        """Return how many more jobs may be there."""
        return self._most - len(self._batch) - len(self._jobs)

    def submit(self, task: Task) -> None:
        """Take a task into the next array job."""
        self._batch.append(task)

    def next(self, timeout: float) -> Outcome | None:
        """Return the next outcome, None when there was none; see `Pool`."""
        if self._batch:
            batch, self._batch = self._batch, []
            jobs = self._executor.map_array(_execute, [task.as_dict() for task in batch])
            self._jobs |= {job.job_id: (job, task) for job, task in zip(jobs, batch, strict=True)}
        for id, (job, task) in self._jobs.items():
            if job.done():
                del self._jobs[id]
                return _outcome(job, task)
        time.sleep(timeout)
        return None

    def end(self) -> None:
        """Cancel all jobs: Slurm sends the signal to save and stop first."""
        self.kill()

    def kill(self) -> None:
        """Cancel all jobs."""
        for job, _ in self._jobs.values():
            job.cancel(check=False)


def _execute(task: dict[str, Any]) -> dict[str, Any]:
    return execute(Task(**task)).as_dict()


def _outcome(job: Any, task: Task) -> Outcome:
    try:
        return Outcome(**job.result())
    except Exception as error:  # of submitit, for jobs that ended without a result: out of time or memory, a node lost
        return Outcome(task.id, FAILED, f"its job {job.job_id} ended without a result: {describe(error)}")


def import_submitit() -> Any:
    """Return the package; raises MissingExtraError where it is not installed."""
    try:
        import submitit
    except ImportError as error:
        raise MissingExtraError("submitit", "slurm") from error
    return submitit
