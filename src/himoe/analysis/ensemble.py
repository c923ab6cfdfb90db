"""How sure a law is: the bootstrap over settings and seeds, and the error on settings that it was not fitted to.

**Settings.** A replicate is the fit plus residuals drawn with replacement from all settings, fitted again. Drawing the
settings themselves would often lose a whole level of an axis, and with it a parameter. A residual is that of a mean
over seeds, so it holds what seeds do to a setting as well as what the law gets wrong. Two corrections keep the
intervals from being too narrow where settings are few: a residual is divided by √(1 − leverage), since a fit follows
its own points, and each replicate draws how large residuals are, √(spare/χ²) with the fit's spare settings, since so
few tell it roughly: what makes Student's interval out of a normal one.

**Seeds.** The same seed gives all settings the same data order, so what it does to all of them at once is in no
residual. Each replicate moves all losses by such a common part, drawn from the seeds' own; it widens the interval of
the loss, not that of the optimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from himoe.analysis.fitting import fit, refit
from himoe.analysis.law import SPARE, Law, choose_form
from himoe.analysis.settings import LEVEL, Setting
from himoe.errors import DataError

Array = np.ndarray

REPLICATES = 400


@dataclass(frozen=True)
class Ensemble:
    """A law and its replicates.

    Attributes:
        law: as fitted.
        theta: (replicates, P).
        common: standard error of what seeds do to all settings at once, in log loss; None with one seed.
    """

    law: Law
    theta: Array
    common: float | None

    def interval(self, values: Array, level: float = LEVEL) -> tuple[float, float]:
        """Return the interval of one number over the replicates."""
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="weibull")
        return float(low), float(high)

    def parameter(self, name: str) -> tuple[float, float] | None:
        """Return the interval of a parameter, None for one that is not fitted."""
        found = self.law.value(name, self.theta)
        return None if found is None or np.ndim(found) == 0 else self.interval(found)


def bootstrap(law: Law, settings: Sequence[Setting] = (), *, replicates: int = REPLICATES, seed: int = 0) -> Ensemble:
    """Return the law with its replicates; equal arguments give equal ones.

    Args:
        law: of the settings.
        settings: what its points are, for the part that seeds have in common.
        replicates: how many.
        seed: of the draws.
    """
    draw = np.random.default_rng(seed)
    points, fitted = law.points, law.points.loss - law.residuals
    weights = points.weights
    corrected = law.residuals * weights / np.sqrt(1 - law.leverage)
    corrected = corrected - corrected.mean()
    common, seeds = common_part(settings)
    size = np.sqrt(law.spare / draw.chisquare(law.spare, (replicates, 1)))
    losses = fitted + draw.choice(corrected, (replicates, len(points))) * size / weights
    if common is not None:
        losses = losses + common * draw.standard_t(seeds - 1, (replicates, 1))
    return Ensemble(law, refit(law, losses), common)


def common_part(settings: Sequence[Setting]) -> tuple[float | None, int]:
    """Return the standard error of the mean over seeds of what a seed does to all settings, and the number of seeds.

    Over the seeds that all settings have: for each the mean over settings of log loss less the setting's own mean.
    Where seeds act on every setting on their own, this is small.
    """
    losses = [{row["seed"]: float(np.log(row["cross_entropy"])) for row in one.runs} for one in settings]
    shared = sorted(set.intersection(*(set(one) for one in losses)), key=str) if losses else []
    if len(shared) < 2:
        return None, len(shared)
    table = np.array([[one[seed] for seed in shared] for one in losses])
    effects = (table - table.mean(axis=1, keepdims=True)).mean(axis=0)
    return float(np.std(effects, ddof=1) / np.sqrt(len(shared))), len(shared)


@dataclass(frozen=True)
class HeldOut:
    """Errors on settings that the law was not fitted to, as root mean squares of log loss: about relative errors.

    Attributes:
        what: what was left out.
        error: of the law.
        within: of the same law on what it was fitted to.
        by_mean: of the mean loss of the others, to compare with.
        predicted: of each point left out, its index and log loss.
    """

    what: str
    error: float
    within: float
    by_mean: float
    predicted: list[tuple[int, float]]


def leave_one_out(law: Law) -> HeldOut:
    """Return the errors when each setting in turn is left out of the fit."""
    points, number = law.points, len(law.points)
    others = ~np.eye(number, dtype=bool)
    weights = points.weights * others
    theta = refit(law, np.broadcast_to(points.loss, (number, number)), weights)
    predicted = [(i, float(one)) for i, one in enumerate(np.diag(law.log_loss(points, theta)))]
    means = [float(points.loss[one].mean()) for one in others]
    return _held_out("each setting in turn", law, predicted, means)


def leave_largest_out(law: Law) -> HeldOut | None:
    """Return the errors on the largest active size by a law of the smaller ones, None where these cannot bear one."""
    points = law.points
    largest = points.n > points.n.max() - 0.05
    rest = points.take(~largest)
    if len(np.unique(np.round(rest.n, 6))) < 2 or len(rest) < SPARE + 2:
        return None
    try:
        smaller = fit(rest, choose_form(rest))
    except DataError:
        return None
    where = np.flatnonzero(largest)
    found: Any = smaller.log_loss(points.take(where))
    mean = float(rest.loss.mean())
    return _held_out("the largest active size", law, list(zip(where.tolist(), found.tolist(), strict=True)),
                     [mean] * len(where))  # fmt: skip


def _held_out(what: str, law: Law, predicted: list[tuple[int, float]], means: list[float]) -> HeldOut:
    def rms(values: Array) -> float:
        return float(np.sqrt(np.mean(values**2)))

    true = law.points.loss[[i for i, _ in predicted]]
    errors = true - np.array([value for _, value in predicted])
    return HeldOut(what, rms(errors), rms(law.residuals), rms(true - np.array(means)), predicted)
