"""Strategies against each other on one recipe: one learning rate for all, tuned once, then every seed of every one.

Both steps are sweeps of ordinary runs, so a comparison that is started again goes on, and more seeds leave alone what
is there. The seed of the tuning is no seed of the comparison.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from himoe.analysis import read_sweep
from himoe.analysis.comparison import Comparison, Tuning, comparison
from himoe.analysis.runs import number, unusable
from himoe.config import Config
from himoe.errors import ConfigError, MissingExtraError, RunsFailedError
from himoe.files import write_json
from himoe.sweep.driver import SweepResult, run_sweep
from himoe.sweep.expand import Run, expand
from himoe.sweep.strategies import check_is_one, cost_notes, with_run

TUNING, STRATEGIES = "tuning", "strategies"
TUNING_SEED = 0
FACTOR = 2.0
STEPS_BEYOND = 2
"""How often the search goes on past an end of its rates, in each direction."""


@dataclass(frozen=True)
class Compared:
    """What comparing came to.

    Attributes:
        comparison: means and verdicts.
        result: the sweep behind them.
    """

    comparison: Comparison
    result: SweepResult


def compare_strategies(
    found: Mapping[str, Config],
    out: Path,
    *,
    seeds: int = 5,
    against: str | None = None,
    learning_rate: float | None = None,
    console: Console | None = None,
    **options: Any,
) -> Compared:
    """Train every strategy with the seeds 1 to `seeds`, and compare them seed by seed.

    Args:
        found: configurations by name, as `strategies` returns them.
        out: folder of the comparison: a sweep's, with `tuning/`, the sweep that found the learning rate, and
            `strategies/`, a configuration each, of the first seed.
        seeds: how many; a seed decides the data order, the same for all, and the initial weights.
        against: the strategy that the others are compared with; None is the first.
        learning_rate: of all runs; None finds it: the first strategy's, its half and its double, and on while the best
            is at an end, by the mean of all strategies' validation losses.
        console: where progress goes; standard error when None.
        options: of `run_sweep`.

    Raises:
        HimoeError: before anything has started, as `run_sweep`; or for what `check_comparison` refuses.
        RunsFailedError: there is no rate at which all strategies can be trained, or nothing left to compare.
    """
    console, out = console or Console(stderr=True), Path(out)
    against = check_comparison(found, seeds, against, learning_rate)
    tuning = None
    with TemporaryDirectory() as folder:  # a sweep reads what it is to do at its start
        files = write_strategies(found, Path(folder))
        if learning_rate is None:
            tuning = tune(files, out / TUNING, first_rate(found), console=console, **options)
            learning_rate = tuning.chosen
        console.print(f"{len(files)} strategies × {seeds} seeds at learning rate {learning_rate:g}", highlight=False)
        spec = comparison_spec(files, range(1, seeds + 1), [learning_rate])
        result = run_sweep(spec, out, console=console, **options)
    chosen = {name: with_run(one, seed=1, learning_rate=learning_rate) for name, one in found.items()}
    write_strategies(chosen, out / STRATEGIES)
    runs = {run.id: run.config.name for run in result.runs}
    assert len(runs) == len(found) * seeds, runs
    told = comparison(
        read_sweep(out),
        runs,
        against,
        learning_rate=learning_rate,
        tuning=tuning,
        notes=[*cost_notes(found, against), *(tuning.failures if tuning else [])],
    )
    return Compared(told, result)


def check_comparison(
    found: Mapping[str, Config], seeds: int, against: str | None = None, learning_rate: float | None = None
) -> str:
    """Return what the others are compared with, or refuse what cannot be compared.

    Raises:
        ConfigError: fewer than two seeds, an unknown name, a rate that is none, or strategies on unlike text, lengths
            or batches.
        MissingExtraError: scipy is not installed, which the verdict needs.
    """
    against = against if against is not None else next(iter(found))
    if against not in found:
        raise ConfigError(f"--against {against}: must be one of {', '.join(found)}")
    if seeds < 2:
        raise ConfigError(f"--seeds {seeds}: must be ≥ 2; from one seed no interval can be made")
    if learning_rate is not None and not 0 < learning_rate < float("inf"):
        raise ConfigError(f"--learning-rate {learning_rate:g}: must be above 0")
    check_is_one(found)
    try:
        import scipy.special  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("scipy", "analysis") from error
    return against


def planned_runs(found: Mapping[str, Config], seeds: int, learning_rate: float | None = None) -> list[Run]:
    """Return the runs that are known before any has ended: of the tuning its first rates, of all seeds at the middle.

    Nothing is written.
    """
    with TemporaryDirectory() as folder:
        files = write_strategies(found, Path(folder))
        rate = first_rate(found) if learning_rate is None else learning_rate
        tuned = expand(comparison_spec(files, [TUNING_SEED], rates_around(rate))) if learning_rate is None else []
        return [*tuned, *expand(comparison_spec(files, range(1, seeds + 1), [rate]))]


def first_rate(found: Mapping[str, Config]) -> float:
    """Return the rate that the search begins with: the first strategy's."""
    return next(iter(found.values())).train.learning_rate


def rates_around(first: float, lowest: int = -1, highest: int = 1) -> list[float]:
    """Return the rates of the search, ascending."""
    return [first * FACTOR**power for power in range(lowest, highest + 1)]


def comparison_spec(files: Sequence[str], seeds: Sequence[int], rates: Sequence[float]) -> dict[str, Any]:
    """Return the sweep of all strategies, a seed of all of them before the next."""
    return {"axes": {"train.learning_rate": [*rates], "seed": [*seeds], "recipe": [*files]}}


def write_strategies(found: Mapping[str, Config], folder: Path) -> list[str]:
    """Write every configuration to `folder/NAME.json`, which a sweep and `himoe train` take; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, config in found.items():
        write_json(folder / f"{name}.json", config.model_dump(mode="json"))
    return [str(folder / f"{name}.json") for name in found]


def tune(files: Sequence[str], out: Path, first: float, *, console: Console, **options: Any) -> Tuning:
    """Find the learning rate with the lowest mean validation loss over all strategies, on one seed of its own.

    Raises:
        RunsFailedError: at no rate did all strategies finish.
    """
    lowest, highest = -1, 1
    losses: dict[float, dict[str, float | None]] = {}
    failures: list[str] = []
    while True:
        rates = rates_around(first, lowest, highest)
        new = [rate for rate in rates if rate not in losses]  # what failed has had its tries
        told = ", ".join(f"{rate:g}" for rate in new)
        console.print(f"tuning the learning rate on all strategies, seed {TUNING_SEED}: {told}", highlight=False)
        result = run_sweep(comparison_spec(files, [TUNING_SEED], new), out, console=console, **options)
        rows = {str(row["run"]): row for row in read_sweep(out).rows}
        losses = {rate: losses.get(rate, {}) for rate in rates}
        for run in result.runs:
            rate, name, row = run.config.train.learning_rate, run.config.name, rows[run.id]
            reason = unusable(row)
            losses[rate][name] = None if reason else number(row["cross_entropy"])
            if reason:
                failures.append(f"tuning: {name} at {rate:g} {reason}; that rate could not be chosen")
        tuning = Tuning(losses, TUNING_SEED, failures)
        if not tuning.usable:
            raise RunsFailedError(
                f"at no learning rate of {told} did every strategy finish: {failures[0]}; see {out / 'runs.parquet'}"
            )
        if tuning.chosen == rates[0] and lowest > -1 - STEPS_BEYOND:
            lowest -= 1
        elif tuning.chosen == rates[-1] and highest < 1 + STEPS_BEYOND:
            highest += 1
        else:
            return tuning
