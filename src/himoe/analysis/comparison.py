"""Strategies on one recipe: their means, and what seed by seed can be said of each against one of them.

Takes the rows of a sweep in which strategies share their seeds, and so the order of their data. What decides is the
validation cross-entropy, without any auxiliary term (`himoe.analysis.paired`); everything else stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from himoe.analysis.paired import Verdict, compare
from himoe.analysis.runs import SAME_LENGTH, Left, Row, Sweep, left_of, number, unusable
from himoe.analysis.settings import Mean, mean_of, student
from himoe.errors import RunsFailedError

LEVELS = ("expert", "group")
BALANCE = {"cv": "CV", "max_vio": "MaxVio"}


@dataclass(frozen=True)
class Tuning:
    """How the learning rate was found.

    Attributes:
        losses: of each rate, in ascending order, the validation loss of every strategy; None where a run failed or was
            stopped.
        seed: of these runs, which no compared run has.
        failures: those that failed or were stopped, with the reason.
    """

    losses: dict[float, dict[str, float | None]]
    seed: int
    failures: list[str]

    @property
    def usable(self) -> dict[float, float]:
        """Return the mean loss over the strategies at each rate at which all of them finished."""
        return {
            rate: fmean(loss for loss in one.values() if loss is not None)
            for rate, one in self.losses.items()
            if None not in one.values()
        }

    @property
    def chosen(self) -> float:
        """Return the rate of the lowest mean."""
        means = self.usable
        return min(means, key=lambda rate: means[rate])

    @property
    def at_end(self) -> bool:
        """True where a lower or a higher rate might have been better still."""
        return self.chosen in (min(self.usable), max(self.usable))

    def best_of(self, strategy: str) -> float | None:
        """Return the rate at which one strategy alone was best."""
        own = {rate: one[strategy] for rate, one in self.losses.items() if one.get(strategy) is not None}
        return min(own, key=lambda rate: own[rate] or 0.0) if own else None


@dataclass(frozen=True)
class Strategy:
    """One strategy: means over its seeds.

    Attributes:
        name: of the strategy.
        rows: its finished runs by seed.
        loss: validation cross-entropy, nats per token.
        bits_per_byte: over all held-out text; None where a run has none, as all below.
        domains: bits per byte by domain.
        balance: "cv" and "max_vio", each by level: of experts, and of groups where there are any.
        dead_experts: mean number in a layer.
        seconds: from start to end, evaluations included.
        tokens_per_second: of training alone.
        active: active parameters without embeddings.
        total: all parameters.
        training_flops: of a run.
    """

    name: str
    rows: dict[Any, Row]
    loss: Mean
    bits_per_byte: Mean | None
    domains: dict[str, Mean]
    balance: dict[str, dict[str, Mean]]
    dead_experts: Mean | None
    seconds: Mean | None
    tokens_per_second: Mean | None
    active: float | None
    total: float | None
    training_flops: float | None


@dataclass(frozen=True)
class Comparison:
    """Strategies and what can be said of them.

    Attributes:
        sweep: what was read.
        against: the strategy that the others are compared with.
        strategies: the lowest loss first.
        verdicts: of the others on the validation loss, in the order of `strategies`.
        domains: the same on each domain's bits per byte, corrected over the strategies of one domain.
        learning_rate: of all runs.
        tuning: how it was found; None where it was given.
        left: runs that no mean holds.
        notes: what a reader must know before believing it.
    """

    sweep: Sweep
    against: str
    strategies: list[Strategy]
    verdicts: list[Verdict]
    domains: dict[str, list[Verdict]]
    learning_rate: float
    tuning: Tuning | None
    left: list[Left]
    notes: list[str]

    @property
    def base(self) -> Strategy:
        """Return the strategy that the others are compared with."""
        return next(one for one in self.strategies if one.name == self.against)

    @property
    def levels(self) -> list[str]:
        """Return the levels whose balance is known of some strategy."""
        return [level for level in LEVELS if any(level in one.balance["cv"] for one in self.strategies)]

    def verdict_of(self, name: str, domain: str | None = None) -> Verdict | None:
        """Return a strategy's verdict, on one domain or on all text; None for the one that others are compared with."""
        told = self.verdicts if domain is None else self.domains[domain]
        return next((one for one in told if one.name == name), None)


def comparison(
    sweep: Sweep,
    runs: Mapping[str, str],
    against: str,
    *,
    learning_rate: float,
    tuning: Tuning | None = None,
    notes: Sequence[str] = (),
) -> Comparison:
    """Compare strategies.

    Args:
        sweep: the table of the runs.
        runs: the strategy of every run that counts, by the run's identity; other rows are not looked at.
        against: the strategy that the others are compared with.
        learning_rate: of all runs.
        tuning: how it was found; None where it was given.
        notes: what a reader must know beside what is found here.

    Raises:
        RunsFailedError: it has no finished run, or no other strategy has one with a seed of its.
    """
    found: dict[str, dict[Any, Row]] = {name: {} for name in dict.fromkeys(runs.values())}
    rows = [row for row in sweep.rows if str(row["run"]) in runs]
    longest = max((float(row["tokens"]) for row in rows if not unusable(row)), default=0.0)
    left: list[Left] = []
    for row in rows:
        name, reason = runs[str(row["run"])], unusable(row)
        if not reason and row["tokens"] < longest * (1 - SAME_LENGTH):
            reason = f"ended at {row['tokens']:,.0f} of {longest:,.0f} tokens"
        if reason:
            left.append(left_of({**row, "name": f"{name} seed={row['seed']}"}, reason))
        else:
            found[name][row["seed"]] = row
    whole = {name: by_seed for name, by_seed in found.items() if by_seed}
    paired = {name: by_seed for name, by_seed in whole.items() if set(by_seed) & set(whole.get(against, ()))}
    if len(paired) < 2:
        reasons = "; ".join(f"{one.name} {one.reason}" for one in left)
        what = "no other strategy has a finished run of a seed that it has" if against in whole else "it has none"
        raise RunsFailedError(f"nothing can be compared with the finished runs of {against}: {what} ({reasons})")
    strategies = sorted((_strategy(name, by_seed) for name, by_seed in whole.items()), key=lambda one: one.loss.value)
    by_seed = {one.name: one.rows for one in strategies if one.name in paired}  # verdicts have the same order
    return Comparison(
        sweep,
        against,
        strategies,
        compare(
            {name: {seed: float(row["cross_entropy"]) for seed, row in rows.items()} for name, rows in by_seed.items()},
            against,
        ),
        _by_domain(by_seed, against),
        learning_rate,
        tuning,
        left,
        [*notes, *_lacking(found, against)],
    )


def _strategy(name: str, by_seed: dict[Any, Row]) -> Strategy:
    rows = list(by_seed.values())
    first = rows[0]

    def each(column: str) -> dict[str, Mean]:
        """Return the means of a column of names and numbers."""
        names = dict.fromkeys(name for row in rows for name in _entries(row, column))
        means = {name: mean_of(_entries(row, column).get(name) for row in rows) for name in names}
        return {name: mean for name, mean in means.items() if mean is not None}

    return Strategy(
        name=name,
        rows=by_seed,
        loss=student([float(row["cross_entropy"]) for row in rows]),
        bits_per_byte=mean_of(row.get("bits_per_byte") for row in rows),
        domains=each("bits_per_byte_by_domain"),
        balance={what: each(f"{what}_by_level") for what in BALANCE},
        dead_experts=mean_of(row.get("dead_experts") for row in rows),
        seconds=mean_of(row.get("wall_seconds") for row in rows),
        tokens_per_second=mean_of(row.get("tokens_per_second") for row in rows),
        active=number(first.get("active_without_embeddings")),
        total=number(first.get("total_parameters")),
        training_flops=number(first.get("training_flops")),
    )


def _entries(row: Row, column: str) -> dict[str, Any]:
    """Return a column of names and numbers, which a table holds as a list of pairs."""
    return dict(row.get(column) or {})


def _by_domain(whole: Mapping[str, Mapping[Any, Row]], against: str) -> dict[str, list[Verdict]]:
    """Return the verdicts on every domain that all runs have."""
    column = "bits_per_byte_by_domain"
    scores = {name: {seed: _entries(row, column) for seed, row in by_seed.items()} for name, by_seed in whole.items()}
    every = [one for by_seed in scores.values() for one in by_seed.values()]
    found = {}
    for domain in every[0]:
        if all(number(one.get(domain)) is not None for one in every):
            values = {name: {seed: one[domain] for seed, one in by_seed.items()} for name, by_seed in scores.items()}
            found[domain] = compare(values, against)
    return found


def _lacking(found: Mapping[str, Mapping[Any, Row]], against: str) -> list[str]:
    """Say where strategies lack seeds that others have."""
    seeds = sorted(set().union(*found.values()), key=str)
    notes = []
    for name, by_seed in found.items():
        missing = ", ".join(str(seed) for seed in seeds if seed not in by_seed)
        if not by_seed:
            notes.append(f"none of the runs of {name} can be used: it is in no table")
        elif name != against and not set(by_seed) & set(found[against]):
            notes.append(f"{name} shares no seed with the finished runs of {against}: there is no verdict on it")
        elif missing:
            notes.append(f"{name} has no finished run of seed {missing}: its mean and pairs are of the others")
    return notes
