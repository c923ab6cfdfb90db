"""Asynchronous successive halving (ASHA, arXiv 1810.05934) through Optuna's pruner, its state read from run folders.

A run that reaches rung k, at `first · factor^k` steps, goes on if its validation cross-entropy is among the best
1/`factor` of the runs that have reached the rung so far. What those had there stands in their metrics.jsonl, so there
is nothing to keep, to lose, or to send between workers.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from himoe.errors import MissingExtraError
from himoe.run_folder import read_log


@dataclass(frozen=True)
class Halving:
    """The early stop of one sweep.

    Attributes:
        runs: the folder of the run folders.
        ids: the runs that compete.
        first: steps of the first rung.
        factor: of the runs at a rung, one in so many goes on.
    """

    runs: str
    ids: list[str]
    first: int
    factor: int = 3

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)

    def prunes(self, run: str, step: int, loss: float | None) -> bool:
        """Return whether `run`, which has this cross-entropy at this step, ends here."""
        if loss is None or step < self.first:
            return False
        optuna = import_optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(storage=optuna.storages.InMemoryStorage())
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=self.first, reduction_factor=self.factor)
        done = optuna.trial.TrialState.COMPLETE
        for other in self.ids:
            if other != run and (rungs := self._rungs(evaluations(Path(self.runs) / other))):
                study.add_trial(optuna.trial.create_trial(state=done, value=0.0, system_attrs=rungs))
        before = {at: value for at, value in evaluations(Path(self.runs) / run).items() if at < step}
        running = optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING,
            intermediate_values={step: loss},
            system_attrs=self._rungs(before),
        )
        study.add_trial(running)
        return pruner.prune(study, study.trials[-1])

    def _rungs(self, values: dict[int, float]) -> dict[str, float]:
        """Return the value at every rung, the first at or after its step, in the words of Optuna's pruner."""
        rungs: dict[str, float] = {}
        for step, value in sorted(values.items()):
            while step >= self.first * self.factor ** len(rungs):
                rungs[f"completed_rung_{len(rungs)}"] = value
        return rungs


def evaluations(folder: Path) -> dict[int, float]:
    """Return the validation cross-entropy of a run by step, those during training."""
    lines = [line for line in read_log(folder / "metrics.jsonl") if line.get("kind") == "eval" and "final" not in line]
    return {line["step"]: line["loss"] for line in lines if isinstance(line.get("loss"), int | float)}


def import_optuna() -> Any:
    """Return the package; raises MissingExtraError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("optuna", "sweep") from error
    return optuna
