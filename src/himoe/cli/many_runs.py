"""What the verbs that do many runs have in common: how many at a time, and where."""

from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import UseAppendAction

from himoe.cli.parsing import Verb, option
from himoe.errors import ConfigError
from himoe.sweep import EngineOptions


@dataclass(kw_only=True)
class ManyRuns(Verb):
    """Base of the verbs that do many runs."""

    workers: Annotated[int, option("N")] = 1
    """Runs at a time. Without it: 1."""
    engine: Annotated[str, option("local|ray|slurm")] = "local"
    """Where runs go: processes on this machine, actors on Ray, or jobs of Slurm. Without it: local."""
    retries: Annotated[int, option("N")] = 1
    """How often a failed run is tried again. Without it: 1."""
    cpus_per_run: Annotated[int | None, option("N")] = None
    """Cores of a run. Without it: an equal part of this machine's; 1 on Ray and Slurm."""
    gpus_per_run: Annotated[float, option("N")] = 0.0
    """GPUs of a run, also a part of one, as in 0.25 for four runs to a GPU; Slurm gives whole ones.
    Without it: 0, which on this machine leaves all GPUs to all runs."""
    address: Annotated[str | None, option("ADDRESS")] = None
    """Of an existing Ray cluster, or auto to find it. Without it: one is started on this machine."""
    slurm: Annotated[UseAppendAction[tuple[str, ...]], option("KEY=VALUE")] = ()
    """What Slurm is told, in submitit's words, as in slurm_partition=gpu or timeout_min=60; may be given often.
    Without it: what Slurm does by default."""

    def how(self) -> dict[str, Any]:
        """Return these arguments as those of `run_sweep`."""
        if self.retries < 0:
            raise ConfigError(f"--retries {self.retries}: must be ≥ 0")
        options = EngineOptions(
            cpus_per_run=self.cpus_per_run,
            gpus_per_run=self.gpus_per_run,
            address=self.address,
            slurm=_settings(self.slurm),
        )
        return {"workers": self.workers, "engine": self.engine, "retries": self.retries, "options": options}


def _settings(given: tuple[str, ...]) -> tuple[tuple[str, str | int], ...]:
    found: list[tuple[str, str | int]] = []
    for text in given:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ConfigError(f"--slurm {text}: must look like key=value, as in --slurm slurm_partition=gpu")
        found.append((key, int(value) if value.isdigit() else value))
    return tuple(found)
