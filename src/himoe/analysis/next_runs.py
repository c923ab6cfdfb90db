"""Which settings to run next, so that the best granularity and sparsity become surer.

A setting is worth the variance of the best ln g and ln s, over the bootstrap's replicates, that its outcome would
explain,

    Σ over ln g and ln s of cov(best, outcome)² / (var(outcome) + residual variance),

and after the first is chosen the covariances are those that are left when its outcome is known, so that the second adds
to it. Replicates that disagree about a setting while agreeing about the best gain nothing from it. This is what one
would learn if the law were true.

Where the best lies at an end of what was measured in at least half of the replicates, there is nothing yet to be
surer of: the first setting then is the one next to the best with that axis a factor of 2 beyond the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from himoe.analysis.budget import Sizes
from himoe.analysis.law import Law
from himoe.analysis.optimum import Place, at_end, best, measured
from himoe.analysis.runs import number
from himoe.analysis.settings import Setting
from himoe.analysis.study import Fitted

EXPERT_KEYS = ("moe.num_experts", "moe.top_k", "moe.expert_dim")
OFTEN = 0.05
"""Share of replicates at an end of the range from which on the best may lie beyond it."""
OCTAVE = float(np.log(2))
NUM_RUNS = 4
SMALLEST_EXPERT = 16


@dataclass(frozen=True)
class Next:
    """A setting to run next.

    Attributes:
        set: keys of the configuration.
        granularity: g.
        sparsity: s.
        explains: share of the best's variance that its outcome would explain, beside those listed before it.
        new: outside of what was measured.
    """

    set: dict[str, int]
    granularity: float
    sparsity: float
    explains: float
    new: bool


def next_runs(
    fitted: Fitted, sizes: Sizes, at: Place, spread: Place, family: list[Setting], num_groups: int
) -> list[Next]:
    """Return the most telling settings of one active size, those after the first given the outcome of those before."""
    law, theta = fitted.ensemble.law, fitted.ensemble.theta
    n, d = np.log(family[0].active or 1.0), max(np.log(one.tokens) for one in family)
    candidates = _candidates(law, family, spread, sizes.width, num_groups)
    if not candidates:
        return []
    place = Place(*(np.array(column) for column in zip(*((n, np.log(s), np.log(g), d) for _, s, g in candidates),
                                                      strict=True)))  # fmt: skip
    aim = best(law, theta, at.n, at.d, reach=2 * OCTAVE)
    targets = np.column_stack([aim.g[:, 0], aim.s[:, 0]])
    # Runs of the same seeds share what a seed does to all of them, so outcomes count against the mean of what there is.
    outcomes = law.log_loss(place, theta) - law.log_loss(law.points, theta).mean(axis=1, keepdims=True)
    everything = np.column_stack([targets, outcomes])
    covariance = np.cov(everything, rowvar=False)
    whole = float(np.trace(covariance[:2, :2]))
    ranges = {axis: measured(law, axis) for axis in "gs"}
    first = _beyond(law, spread, at, candidates)
    found: list[Next] = []
    for _ in range(NUM_RUNS if whole > 0 else 0):
        noise = np.diag(covariance)[2:] + law.scale**2
        worth = (covariance[:2, 2:] ** 2).sum(axis=0) / noise
        worth[[candidates.index(_candidate(one)) for one in found]] = 0.0
        i = int(np.argmax(worth)) if first is None or found else first
        keys, s, g = candidates[i]
        new = not all(ranges[axis][0] - 0.01 <= np.log(value) <= ranges[axis][1] + 0.01 for axis, value in
                      (("g", g), ("s", s)))  # fmt: skip
        found.append(Next(dict(zip(EXPERT_KEYS, keys, strict=True)), g, s, float(worth[i]) / whole, new))
        gain = covariance[:, i + 2] / noise[i]
        covariance = covariance - np.outer(gain, covariance[i + 2])
        if len(found) == len(candidates):
            break
    return found


def _beyond(law: Law, spread: Place, at: Place, candidates: list[tuple[tuple[int, ...], float, float]]) -> int | None:
    """Return the candidate beyond an end at which most replicates' best lies, None where there is no such end."""
    aim = {"g": at.g, "s": at.s}
    for axis in aim:
        low, high = measured(law, axis)
        at_low, at_high = at_end(getattr(spread, axis), low, high) if high - low > 1e-6 else (0.0, 0.0)
        if max(at_low, at_high) >= 0.5:
            aim[axis] = low - OCTAVE if at_low > at_high else high + OCTAVE
    if aim == {"g": at.g, "s": at.s}:
        return None
    away = [abs(np.log(s) - aim["s"]) + abs(np.log(g) - aim["g"]) for _, s, g in candidates]
    return int(np.argmin(away))


def _candidate(one: Next) -> tuple[tuple[int, ...], float, float]:
    return tuple(one.set[key] for key in EXPERT_KEYS), one.sparsity, one.granularity


def _candidates(
    law: Law, family: list[Setting], spread: Place, width: float, num_groups: int
) -> list[tuple[tuple[int, ...], float, float]]:
    """Return (E, K, F), s and g of settings that are not there yet, with s a power of two or half more.

    Within what was measured, where the law is known to hold, and a factor of 2 beyond an end at which the best may lie.
    """
    dim = number(family[0].fact("dim"))
    if dim is None:
        return []
    found, ranges = [], []
    for axis in "gs":
        ends = measured(law, axis)
        shares = at_end(getattr(spread, axis), *ends) if ends[1] - ends[0] > 1e-6 else (0.0, 0.0)
        reach = [OCTAVE if share >= OFTEN else 0.0 for share in shares]
        ranges.append((ends[0] - reach[0] - 0.01, ends[1] + reach[1] + 0.01))
    largest = 2 * max(float(one.fact("num_experts")) for one in family)
    there = {(one.fact("num_experts"), one.fact("top_k"), one.fact("expert_dim")) for one in family}
    for k in range(num_groups, 513, num_groups):
        hidden = 4 * dim * width / k
        g = width / k
        if abs(hidden - round(hidden)) > 1e-6 or hidden < SMALLEST_EXPERT or not _inside(g, ranges[0]):
            continue
        for s in sorted({1} | {base * 2**power for power in range(11) for base in (2, 3)}):
            if (s * k, k, round(hidden)) in there:
                continue
            if _inside(s, ranges[1]) and s * k <= largest:
                found.append(((s * k, k, round(hidden)), float(s), g))
    return found


def _inside(value: float, ends: tuple[float, float]) -> bool:
    return ends[0] <= float(np.log(value)) <= ends[1]
