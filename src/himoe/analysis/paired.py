"""Is one strategy better than another? Paired differences by seed, their intervals, and a verdict in plain words.

Two strategies that share a seed share the data order, so what the seed does to both cancels in their difference. The
interval that decides is Student's on these differences. With five of them a bootstrap has 126 different resamples,
and its intervals are too narrow: of normal differences, percentile ones hold the truth in about 83 % of cases where
95 % is meant, bias-corrected and accelerated ones (BCa, Efron 1987, doi 10.1080/01621459.1987.10478410) in about 80
%, since neither knows how rough five numbers' own spread is; Student's is exact for them. A BCa interval stands
beside it as a check on that assumption: it decides nothing. Several comparisons are corrected by Holm's method
(Scandinavian Journal of Statistics 6, 1979, 65–70), which holds however they depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from himoe.analysis.settings import student_quantile
from himoe.errors import ConfigError, MissingExtraError

Word = Literal["better", "worse", "no difference seen", "one seed: nothing can be said"]

LEVEL, POWER = 0.95, 0.8


@dataclass(frozen=True)
class Verdict:
    """One strategy against another.

    Attributes:
        name: the strategy.
        against: what it is compared with.
        word: what can be said.
        difference: mean over seeds of `name` less `against`.
        low: lower end of Student's interval at `level`; None for one seed, as are all below.
        high: its upper end.
        bootstrap: BCa interval of the same level, as a check.
        p: two-sided p-value of the paired t test.
        adjusted_p: the same after Holm's correction over the comparisons made together.
        detectable: the smallest true difference that this number of seeds and this spread would have shown with 80 %
            probability or more, at the strictest level that Holm's correction asks for: (1 - level) over the number of
            comparisons made together.
        seeds: of the pairs, n.
        alone: seeds that only one of both has, and which count nowhere.
        level: of the intervals.
        higher_is_better: of the quantity.
    """

    name: str
    against: str
    word: Word
    difference: float
    low: float | None
    high: float | None
    bootstrap: tuple[float, float] | None
    p: float | None
    adjusted_p: float | None
    detectable: float | None
    seeds: tuple[Any, ...]
    alone: tuple[Any, ...]
    level: float = LEVEL
    higher_is_better: bool = False

    def sentence(self, quantity: str = "loss", digits: int = 4) -> str:
        """Return the verdict in words, with its numbers."""
        n = len(self.seeds)
        if self.low is None or self.high is None or self.adjusted_p is None or self.detectable is None:
            return f"{self.name} against {self.against}: {self.word} ({quantity} {self.difference:+.{digits}f})"
        numbers = (
            f"{quantity} {self.difference:+.{digits}f} (95 % interval {self.low:+.{digits}f} to {self.high:+.{digits}f}"
            if self.level == LEVEL
            else f"{quantity} {self.difference:+.{digits}f} ({self.level:.0%} interval "
            f"{self.low:+.{digits}f} to {self.high:+.{digits}f}"
        )
        numbers += f", {n} seeds, p {_p(self.adjusted_p)} after Holm's correction)"
        seen = f"{self.name} against {self.against}: {self.word}, {numbers}"
        return f"{seen}; a difference of {self.detectable:.{digits}f} would have been seen four times in five"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def verdict(
    name: str,
    ours: Mapping[Any, float],
    against: str,
    theirs: Mapping[Any, float],
    *,
    level: float = LEVEL,
    higher_is_better: bool = False,
    comparisons: int = 1,
) -> Verdict:
    """Compare two strategies on one quantity, seed by seed.

    Args:
        name: the strategy.
        ours: its value for every seed.
        against: what it is compared with.
        theirs: the other's.
        level: of the intervals; the word is by the p-value at 1 − level.
        higher_is_better: false for a loss.
        comparisons: how many are made together, for `detectable` alone; `compare` corrects the p-values.

    Raises:
        ConfigError: no seed in common.

    >>> found = verdict("a", {0: 1.0, 1: 1.2, 2: 1.1}, "b", {0: 2.0, 1: 2.1, 2: 2.3})
    >>> found.word, round(found.difference, 3), round(found.low, 3), round(found.high, 3)
    ('better', -1.033, -1.413, -0.654)
    """
    seeds = sorted(set(ours) & set(theirs), key=str)
    alone = tuple(sorted(set(ours) ^ set(theirs), key=str))
    if not seeds:
        raise ConfigError(f"{name} and {against} have no seed in common, so nothing is paired; run both on equal seeds")
    differences = np.array([ours[seed] - theirs[seed] for seed in seeds], dtype=float)
    mean, n = float(differences.mean()), len(seeds)
    blank = Verdict(name, against, "one seed: nothing can be said", mean, None, None, None, None, None, None,
                    tuple(seeds), alone, level, higher_is_better)  # fmt: skip
    if n < 2:
        return blank
    spread = float(differences.std(ddof=1))
    error = spread / math.sqrt(n)
    half = student_quantile((1 + level) / 2, n - 1) * error
    p = _p_of_mean(mean, error, n)
    found = replace(
        blank,
        low=mean - half,
        high=mean + half,
        p=p,
        bootstrap=bca(differences, level=level),
        detectable=detectable(spread, n, alpha=(1 - level) / comparisons),
    )
    return _judged(found, p)


def _p_of_mean(mean: float, error: float, n: int) -> float:
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    from scipy.special import stdtr

    return float(2 * stdtr(n - 1, -abs(mean) / error))


def _judged(found: Verdict, adjusted: float) -> Verdict:
    """Return the verdict with its word, by a p-value that is corrected already."""
    if adjusted >= 1 - found.level:
        return replace(found, adjusted_p=adjusted, word="no difference seen")
    good = (found.difference > 0) == found.higher_is_better
    return replace(found, adjusted_p=adjusted, word="better" if good else "worse")


def compare(
    values: Mapping[str, Mapping[Any, float]],
    against: str,
    *,
    level: float = LEVEL,
    higher_is_better: bool = False,
) -> list[Verdict]:
    """Compare every strategy with one of them, corrected over these comparisons by Holm's method.

    A verdict may say "no difference seen" although its own interval leaves zero out: the interval is of one comparison
    alone, the word counts how many were made.

    Args:
        values: of each strategy, its value for every seed.
        against: which one the others are compared with.
        level: of the intervals and, as 1 − level, of the chance of any false verdict among them.
        higher_is_better: false for a loss.

    Raises:
        ConfigError: `against` is none of them, or shares no seed with one.
    """
    if against not in values:
        raise ConfigError(f"nothing to compare with is called {against!r}; there are {', '.join(values)}")
    base, options = values[against], {"level": level, "higher_is_better": higher_is_better}
    others = {name: own for name, own in values.items() if name != against}
    tests = sum(len(set(own) & set(base)) > 1 for own in others.values())
    found = [verdict(name, own, against, base, **options, comparisons=max(1, tests)) for name, own in others.items()]
    tested = [i for i, one in enumerate(found) if one.p is not None]
    for i, adjusted in zip(tested, holm([found[i].p or 0.0 for i in tested]), strict=True):
        found[i] = _judged(found[i], adjusted)
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm's step-down method, in the order given.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    adjusted, highest, left = [0.0] * len(p_values), 0.0, len(p_values)
    for i in sorted(range(len(p_values)), key=lambda i: p_values[i]):
        highest = max(highest, min(1.0, left * p_values[i]))
        adjusted[i] = highest
        left -= 1
    return adjusted


def bca(values: Sequence[float] | np.ndarray, *, level: float = LEVEL, resamples: int = 9999) -> tuple[float, float]:
    """Return the bias-corrected and accelerated bootstrap interval of a mean; equal values give equal intervals."""
    given = np.asarray(values, dtype=float)
    if np.ptp(given) == 0:  # no resample differs
        return float(given[0]), float(given[0])
    try:
        from scipy.stats import bootstrap
    except ImportError as error:
        raise MissingExtraError("scipy", "analysis") from error
    found = bootstrap((given,), np.mean, confidence_level=level, n_resamples=resamples, method="BCa",
                      rng=np.random.default_rng(0))  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def detectable(spread: float, n: int, *, alpha: float = 1 - LEVEL, power: float = POWER) -> float:
    """Return the smallest true mean difference that a paired t test finds with this power.

    Args:
        spread: standard deviation of the differences.
        n: pairs.
        alpha: two-sided level of the test.
        power: probability to find it.

    >>> round(detectable(1.0, 5), 2), round(detectable(1.0, 20), 2)
    (1.68, 0.66)
    """
    if spread == 0:
        return 0.0
    from scipy.optimize import brentq
    from scipy.special import nctdtr

    edge = student_quantile(1 - alpha / 2, n - 1)

    def lack(shift: float) -> float:
        """Return the power at a non-centrality less the wanted one; the test's other side adds next to nothing."""
        return 1 - float(nctdtr(n - 1, shift, edge)) - power

    high = 1.0
    while lack(high) < 0:
        high *= 1.5
    found: Any = brentq(lack, 0.0, high)
    return float(found) * spread / math.sqrt(n)
