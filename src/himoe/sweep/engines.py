"""The engines by name, and their options."""

import os
from dataclasses import dataclass
from pathlib import Path

from himoe.errors import ConfigError, nearest
from himoe.sweep.pool import Pool

ENGINES = ("local", "ray", "slurm")


@dataclass(frozen=True)
class EngineOptions:
    """How an engine runs.

    Attributes:
        cpus_per_run: cores of a run; None: on this machine an equal part, else 1.
        gpus_per_run: GPUs of a run, also a part of one; 0 on this machine: whatever is visible.
        address: of a Ray cluster; None: one of its own on this machine.
        slurm: what submitit hands to Slurm, such as `{"slurm_partition": "gpu", "timeout_min": 60}`.
        executor: of submitit; None: Slurm where there is one.
    """

    cpus_per_run: int | None = None
    gpus_per_run: float = 0.0
    address: str | None = None
    slurm: tuple[tuple[str, str | int], ...] = ()
    executor: str | None = None

    def threads_of(self, engine: str, workers: int) -> int:
        """Return the threads of a run.

        Raises ConfigError for an engine or numbers that cannot be, MissingExtraError where a package is not installed.
        """
        if engine not in ENGINES:
            raise ConfigError(f"--engine {engine}: must be one of {', '.join(ENGINES)}{nearest(engine, ENGINES)}")
        if workers < 1:
            raise ConfigError(f"--workers {workers}: must be ≥ 1")
        if self.cpus_per_run is not None and self.cpus_per_run < 1:
            raise ConfigError(f"--cpus-per-run {self.cpus_per_run}: must be ≥ 1")
        if self.gpus_per_run < 0:
            raise ConfigError(f"--gpus-per-run {self.gpus_per_run:g}: must be ≥ 0")
        if engine != "ray" and self.address is not None:
            raise ConfigError("--address is of a Ray cluster: add --engine ray, or leave it out")
        if engine == "ray":
            from himoe.sweep.on_ray import import_ray

            import_ray()
        if engine == "slurm":
            from himoe.sweep.on_slurm import import_submitit

            import_submitit()
        if engine == "local":
            return self.cpus_per_run or max(1, len(available_cores()) // workers)
        return self.cpus_per_run or 1


def available_cores() -> list[int]:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def open_pool(engine: str, workers: int, threads: int, out: Path, runner: str, options: EngineOptions) -> Pool:
    """Start an engine. Raises ConfigError where there is no such cluster, or it has less than a run needs."""
    if engine == "ray":
        from himoe.sweep.on_ray import RayActors

        return RayActors(workers, threads, options, runner)
    if engine == "slurm":
        from himoe.sweep.on_slurm import SlurmJobs

        return SlurmJobs(workers, threads, out.absolute() / "slurm", options)
    from himoe.sweep.local import Workers

    return Workers(workers, available_cores(), threads, options.gpus_per_run, runner)
