"""What a budget leaves open: parameters and FLOPs as a sweep's models have them, between its sizes and beyond.

Budgets count parameters as `himoe plan` does, both embeddings included; the law counts the active ones without
embeddings and routers. What one is in terms of the other is read off the sweep's own models, on straight lines in
logarithms between its active sizes and along the outer ones beyond.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from himoe.analysis.runs import number
from himoe.analysis.settings import Setting, families
from himoe.errors import ConfigError

Array = np.ndarray

PLACES = 61
"""Active sizes that are tried where a budget leaves them open."""


@dataclass(frozen=True)
class Budget:
    """Limits: active and total parameters, embeddings included, training FLOPs, tokens; None leaves one open."""

    active: float | None = None
    total: float | None = None
    flops: float | None = None
    tokens: float | None = None


@dataclass(frozen=True)
class Sizes:
    """A sweep's active sizes, ascending; all logarithms but `width` and `slope`.

    Attributes:
        n: active parameters without embeddings and routers.
        active: with them, of the size's smallest model.
        flops: of a token.
        width: K·g.
        expanded: (a, b) of total parameters without embeddings over n = a + b·s.
    """

    n: Array
    active: Array
    flops: Array
    width: float
    expanded: tuple[float, float]

    @classmethod
    def of(cls, settings: Sequence[Setting]) -> Sizes:
        """Read them off the settings of a law."""
        rows = []
        for family in families(settings):
            smallest = min(family, key=lambda one: number(one.fact("active_parameters")) or 0)
            costs = [_flops(one) for one in family if _flops(one)]
            active = number(smallest.fact("active_parameters")) or family[0].active or 1.0
            rows.append((family[0].active or 1.0, active, float(np.median(costs)) if costs else 6 * active))
        widths = [float(one.fact("top_k")) * float(one.fact("granularity")) for one in settings]
        n, active, cost = np.log(np.array(rows)).T
        return cls(n, active, cost, float(np.median(widths)), _expanded(settings))

    def n_of(self, active: float) -> float:
        """Return n of active parameters, both logarithms."""
        return float(_line(active, self.active, self.n))

    def active_of(self, n: Array | float) -> Array:
        """Return active parameters of n, both logarithms."""
        return _line(n, self.n, self.active)

    def flops_of(self, n: Array | float) -> Array:
        """Return FLOPs of a token, both logarithms."""
        return _line(n, self.n, self.flops)

    def sparsity_of(self, total: float, n: Array) -> Array:
        """Return the log of the largest s that total parameters allow for n; −inf where none does."""
        a, b = self.expanded
        embeddings = np.exp(self.active_of(n)) - np.exp(n)
        s = ((np.exp(total) - embeddings) / np.exp(n) - a) / b
        return np.log(np.maximum(s, 1e-300))

    def total_of(self, n: float, s: float) -> float:
        """Return total parameters of n and s, which are logarithms."""
        a, b = self.expanded
        return float(np.exp(self.active_of(n)) - np.exp(n) + np.exp(n) * (a + b * np.exp(s)))


def _flops(one: Setting) -> float:
    spent = number(one.fact("training_flops"))
    return spent / one.tokens if spent else 0.0


def _expanded(settings: Sequence[Setting]) -> tuple[float, float]:
    sizes = {id(one): family[0].active or 1.0 for family in families(settings) for one in family}
    points = []
    for one in settings:
        total, active = number(one.fact("total_parameters")), number(one.fact("active_parameters"))
        bare = number(one.fact("active_without_embeddings"))
        if total and active and bare and id(one) in sizes:
            points.append((float(one.fact("sparsity")), (total - active + bare) / sizes[id(one)]))
    if len({s for s, _ in points}) < 2:
        return 0.25, 0.75  # attention 4·D², a feed-forward part of 12·D²
    s, expanded = np.array(points).T
    slope, start = np.polyfit(s, expanded, 1)
    return float(start), float(max(slope, 1e-9))


def _line(x: Array | float, xs: Array, ys: Array) -> Array:
    """Return y at x on straight lines through the points, the outer ones continued; a single one has slope 1."""
    if len(xs) == 1:
        return np.asarray(x, dtype=float) - xs[0] + ys[0]
    x = np.asarray(x, dtype=float)
    left = np.clip(np.searchsorted(xs, x) - 1, 0, len(xs) - 2)
    return ys[left] + (x - xs[left]) * (ys[left + 1] - ys[left]) / (xs[left + 1] - xs[left])


def open_places(budget: Budget, sizes: Sizes, longest: float, fitted: Sequence[str]) -> tuple[Array, Array, Array]:
    """Return the logs of n, of tokens and of the largest sparsity, an entry for each active size within the budget.

    Args:
        budget: the limits.
        sizes: of the sweep.
        longest: log of the most tokens of a run, where neither tokens nor FLOPs are given.
        fitted: parameters of the law.

    Raises:
        ConfigError: the law cannot divide the FLOPs, or no model is that small.
    """
    if budget.active is not None:
        n = np.array([sizes.n_of(np.log(budget.active))])
    elif budget.flops is None and budget.total is None:
        n = sizes.n[-1:]
    else:
        n = sizes.n if len(sizes.n) == 1 else np.linspace(sizes.n[0], sizes.n[-1], PLACES)
    if budget.flops is not None and budget.tokens is None and len(n) > 1 and not {"alpha", "B"} <= set(fitted):
        raise ConfigError(
            f"--flops {budget.flops:.3g}: dividing it between parameters and tokens takes a sweep that varies both on "
            "their own; give --active or --tokens too, or sweep train.steps"
        )
    if budget.tokens is not None:
        d = np.full(len(n), np.log(budget.tokens))
        if budget.flops is not None:
            within = sizes.flops_of(n) + d <= np.log(budget.flops) + 1e-6
            n, d = n[within], d[within]
    elif budget.flops is not None:
        d = np.log(budget.flops) - sizes.flops_of(n)
    else:
        d = np.full(len(n), longest)
    high = np.full(len(n), np.inf) if budget.total is None else sizes.sparsity_of(np.log(budget.total), n)
    n, d, high = n[high >= 0], d[high >= 0], high[high >= 0]
    if not len(n):
        limits = ", ".join(f"--{name} {value:.4g}" for name, value in vars(budget).items() if value is not None)
        raise ConfigError(
            f"{limits}: no model of the sweep's active sizes is within it; raise a limit, or give --active"
        )
    return n, d, high
