"""Strategies on one recipe: their means, and what seed by seed can be said of each against one of them.

Takes the rows of a sweep in which strategies share their seeds, and so the order of their data. What decides is the
validation cross-entropy, without any auxiliary term (`himoe.analysis.paired`); everything else stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from himoe.analysis.paired import Verdict, compare
from himoe.analysis.runs import Left, Row, Sweep, left_of, number, unusable
from himoe.analysis.settings import Mean, student
from himoe.errors import ConfigError, DataError

LEVELS = ("expert", "group")
BALANCE = ("cv", "max_vio")


@dataclass(frozen=True)
class Tuning:
    """How the learning rate was found.

    Attributes:
        losses: of each rate, in ascending order, the validation loss of every strategy; None where a run failed or was
            stopped.
        seed: of these runs, which no compared run has.
        chosen: the rate of the lowest mean over the strategies.
    """

    losses: dict[float, dict[str, float | None]]
    seed: int
    chosen: float

    @property
    def at_end(self) -> bool:
        """True where a lower or a higher rate might have been better still."""
        return self.chosen in (min(self.losses), max(self.losses))

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
        verdicts: of every other strategy on the validation loss.
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
    learning_rate: float | None
    tuning: Tuning | None
    left: list[Left]
    notes: list[str]

    def verdict_of(self, name: str) -> Verdict | None:
        """Return the verdict of one strategy; None for the one that the others are compared with."""
        return next((one for one in self.verdicts if one.name == name), None)


def comparison(
    sweep: Sweep, runs: Mapping[str, str], against: str, *, tuning: Tuning | None = None, notes: Sequence[str] = ()
) -> Comparison:
    """Compare strategies.

    Args:
        sweep: the table of the runs.
        runs: the strategy of every run that counts, by the run's identity; other rows are not looked at.
        against: the strategy that the others are compared with.
        tuning: how the learning rate was found.
        notes: what a reader must know beside what is found here.

    Raises:
        ConfigError: `against` is none of them.
        DataError: it has no finished run, or no other strategy has.
    """
    names = list(dict.fromkeys(runs.values()))
    if against not in names:
        raise ConfigError(f"--against {against}: must be one of {', '.join(names)}")
    rows = [row for row in sweep.rows if str(row["run"]) in runs]
    found: dict[str, dict[Any, Row]] = {name: {} for name in names}
    left: list[Left] = []
    for row in rows:
        if reason := unusable(row):
            left.append(left_of({**row, "name": f"{runs[str(row['run'])]} seed={row['seed']}"}, reason))
        else:
            found[runs[str(row["run"])]][row["seed"]] = row
    whole = {name: by_seed for name, by_seed in found.items() if by_seed}
    if against not in whole or len(whole) < 2:
        first = f": {left[0].name} {left[0].reason}" if left else ""
        raise DataError(f"there is no finished run of {against}, or of any other strategy{first}")
    strategies = sorted((_strategy(name, by_seed) for name, by_seed in whole.items()), key=lambda one: one.loss.value)
    rates = {number(row.get("learning_rate")) for row in rows}
    by_seed = {one.name: one.rows for one in strategies}  # so that verdicts have the same order
    return Comparison(
        sweep,
        against,
        strategies,
        compare({name: _values(rows, "cross_entropy") for name, rows in by_seed.items()}, against),
        _by_domain(by_seed, against),
        rates.pop() if len(rates) == 1 else None,
        tuning,
        left,
        [*notes, *_lacking(names, whole)],
    )


def _values(by_seed: Mapping[Any, Row], column: str) -> dict[Any, float]:
    return {seed: float(row[column]) for seed, row in by_seed.items()}


def _strategy(name: str, by_seed: dict[Any, Row]) -> Strategy:
    rows = list(by_seed.values())
    first = rows[0]
    domains = list(dict.fromkeys(domain for row in rows for domain in _entries(row, "bits_per_byte_by_domain")))
    balance = {}
    for what in BALANCE:
        levels = {level: mean_of([_entries(row, f"{what}_by_level").get(level) for row in rows]) for level in LEVELS}
        balance[what] = {level: mean for level, mean in levels.items() if mean is not None}
    by_domain = {
        name: mean_of([_entries(row, "bits_per_byte_by_domain").get(name) for row in rows]) for name in domains
    }
    of = {column: mean_of([row.get(column) for row in rows])
          for column in ("bits_per_byte", "dead_experts", "wall_seconds", "tokens_per_second")}  # fmt: skip
    return Strategy(
        name=name,
        rows=by_seed,
        loss=student([float(row["cross_entropy"]) for row in rows]),
        bits_per_byte=of["bits_per_byte"],
        domains={name: mean for name, mean in by_domain.items() if mean is not None},
        balance=balance,
        dead_experts=of["dead_experts"],
        seconds=of["wall_seconds"],
        tokens_per_second=of["tokens_per_second"],
        active=number(first.get("active_without_embeddings")),
        total=number(first.get("total_parameters")),
        training_flops=number(first.get("training_flops")),
    )


def mean_of(values: Sequence[Any]) -> Mean | None:
    """Return the mean of numbers, None where one is missing."""
    known = [found for value in values if (found := number(value)) is not None]
    return student(known) if known and len(known) == len(values) else None


def _entries(row: Row, column: str) -> dict[str, Any]:
    """Return a column of names and numbers, which a table holds as a list of pairs."""
    return dict(row.get(column) or {})


def _by_domain(whole: Mapping[str, Mapping[Any, Row]], against: str) -> dict[str, list[Verdict]]:
    """Return the verdicts on every domain that all runs have."""
    rows = [row for by_seed in whole.values() for row in by_seed.values()]
    names = list(_entries(rows[0], "bits_per_byte_by_domain"))
    common = [name for name in names if all(number(_entries(row, "bits_per_byte_by_domain").get(name)) is not None
                                            for row in rows)]  # fmt: skip
    return {
        domain: compare(
            {name: {seed: _entries(row, "bits_per_byte_by_domain")[domain] for seed, row in by_seed.items()}
             for name, by_seed in whole.items()},
            against,
        )
        for domain in common
    }  # fmt: skip


def _lacking(names: Sequence[str], whole: Mapping[str, Mapping[Any, Row]]) -> list[str]:
    """Say where strategies lack seeds that others have."""
    seeds = sorted(set().union(*whole.values()), key=str)
    found = [f"none of the runs of {name} finished: it is in no table" for name in names if name not in whole]
    for name, by_seed in whole.items():
        if missing := [str(seed) for seed in seeds if seed not in by_seed]:
            found.append(
                f"{name} has no finished run of seed {', '.join(missing)}: its mean and pairs are of the others"
            )
    return found
