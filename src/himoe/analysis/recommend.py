"""From a user's sweep: the best sparsity and granularity for a budget, how sure that is, and what to run next.

The best is that of the fitted law (`law.py`) within what was measured; its interval the one in which the best of 95 %
of the bootstrap's replicates lie (`ensemble.py`). What to run next is chosen in `next_runs.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from himoe.analysis.budget import Budget, Sizes, open_places
from himoe.analysis.law import Law
from himoe.analysis.next_runs import EXPERT_KEYS, OFTEN, Next, next_runs
from himoe.analysis.optimum import Place, at_end, best, measured
from himoe.analysis.runs import number
from himoe.analysis.settings import LEVEL, Setting, families
from himoe.analysis.study import Fitted

Array = np.ndarray

BEYOND = 1.1
"""Factor beyond the measured range from which on a warning is due."""


@dataclass(frozen=True)
class Best:
    """One quantity at the optimum.

    Attributes:
        value: of the fit.
        low: of the interval.
        high: of it.
        measured: least and greatest value in the sweep.
        at_low: share of replicates whose best lies at the low end of what was measured.
        at_high: at the high end.
    """

    value: float
    low: float
    high: float
    measured: tuple[float, float] | None = None
    at_low: float = 0.0
    at_high: float = 0.0


@dataclass(frozen=True)
class Recommendation:
    """What a sweep says about a budget.

    Attributes:
        source: of the numbers.
        budget: the limits.
        active: parameters, both embeddings included.
        total: parameters that this is.
        tokens: that it learns from.
        num_experts: E = s·K.
        top_k: K = width/g.
        nearest: a model with whole numbers near that, and its expected loss.
        granularity: the best g; None where it did not vary.
        sparsity: the best s; None where it did not vary.
        loss: expected mean over seeds.
        level: of the intervals.
        warnings: what to know before using it.
        next: settings to run next, the most telling first.
        seeds: to run of each, those of the sweep: what they do to all settings then cancels.
        held_out: the law's error on settings left out, as a share.
        recipe: of the sweep.
        keep: keys of the configuration that stay.
    """

    source: str
    budget: Budget
    active: float
    total: float
    tokens: float
    num_experts: Best
    top_k: Best
    nearest: dict[str, float]
    granularity: Best | None
    sparsity: Best | None
    loss: Best
    level: float
    warnings: list[str]
    next: list[Next]
    seeds: list[int]
    held_out: dict[str, float]
    recipe: str
    keep: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Return it as one tree, with the spec of what to run next."""
        return {**asdict(self), "spec": self.spec()}

    def spec(self) -> str:
        """Return the runs to do next as a file for `himoe sweep`; empty where there are none."""
        if not self.next:
            return ""
        lines = [f"recipe = {_toml(self.recipe)}"]
        if self.keep:
            lines += ["", "[set]", *(f'"{key}" = {_toml(value)}' for key, value in self.keep.items())]
        lines += ["", "[[zip]]"]
        lines += [f'"{key}" = {[one.set[key] for one in self.next]}' for key in self.next[0].set]
        return "\n".join([*lines, "", "[axes]", f"seed = {self.seeds}", ""])


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and value[:1] in "[{":  # a list or table, which the sweep's table holds as JSON
        return value
    return f'"{value}"' if isinstance(value, str) else str(value)


def recommend(fitted: Fitted, budget: Budget, name: str, *, num_groups: int = 1) -> Recommendation:
    """Return what a law says about a budget.

    Args:
        fitted: the law with its replicates.
        budget: the limits.
        name: of the sweep.
        num_groups: by which E and K must divide.

    Raises:
        ConfigError: nothing fits the budget, or the law cannot divide it.
    """
    law, theta = fitted.ensemble.law, fitted.ensemble.theta
    sizes = Sizes.of(fitted.settings)
    n, d, high = open_places(budget, sizes, float(law.points.d.max()), law.form.terms)
    found = _cheapest(law, law.theta[None], n, d, high)
    spread = _cheapest(law, theta, n, d, high)
    at = Place(*(float(getattr(found, axis)[0]) for axis in "nsgd"))
    losses = np.exp(law.log_loss(_one(at), theta)[:, 0])
    loss = Best(float(np.exp(law.log_loss(_one(at))[0])), *fitted.ensemble.interval(losses))
    top_k = np.maximum(sizes.width / np.exp(spread.g), 1.0)
    experts = np.exp(spread.s) * top_k
    k = float(max(sizes.width / np.exp(at.g), 1.0))
    family = _family(fitted.settings, at.n)
    return Recommendation(
        source=f"the sweep {name}",
        budget=budget,
        active=float(np.exp(sizes.active_of(at.n))),
        total=sizes.total_of(at.n, at.s),
        tokens=float(np.exp(at.d)),
        num_experts=Best(float(np.exp(at.s)) * k, *fitted.ensemble.interval(experts)),
        top_k=Best(k, *fitted.ensemble.interval(top_k)),
        nearest=_nearest(law, at, sizes, family, num_groups),
        granularity=_quantity(fitted, spread.g, at.g, "g"),
        sparsity=_quantity(fitted, spread.s, at.s, "s"),
        loss=loss,
        level=LEVEL,
        warnings=_warnings(fitted, sizes, at, spread, high, budget),
        next=next_runs(fitted, sizes, at, spread, family, num_groups),
        seeds=_seeds(fitted.settings),
        held_out={one.what: one.error for one in fitted.held_out},
        recipe=str(family[0].fact("recipe")),
        keep=_keep(family[0]),
    )


def _one(at: Place) -> Place:
    return Place(*(np.array([getattr(at, axis)]) for axis in "nsgd"))


def _cheapest(law: Law, theta: Array, n: Array, d: Array, high: Array) -> Place:
    """Return the best place of each replicate, over the active sizes that the budget leaves open."""
    place = best(law, theta, n, d, high)
    rows = np.arange(len(theta))
    chosen = np.zeros_like(rows) if len(n) == 1 else np.argmin(_losses(law, theta, place), axis=1)
    return Place(*(getattr(place, axis)[rows, chosen] for axis in "nsgd"))


def _losses(law: Law, theta: Array, place: Place) -> Array:
    found = []
    for i, one in enumerate(theta):
        found.append(law.log_loss(Place(*(getattr(place, axis)[i] for axis in "nsgd")), one))
    return np.array(found)


def _quantity(fitted: Fitted, spread: Array, value: float, axis: str) -> Best | None:
    law = fitted.ensemble.law
    low, high = measured(law, axis)
    if high - low < 1e-6:
        return None
    ends = np.exp(fitted.ensemble.interval(spread))
    shares = at_end(spread, low, high)
    return Best(
        float(np.exp(value)), float(ends[0]), float(ends[1]), (float(np.exp(low)), float(np.exp(high))), *shares
    )


def _nearest(law: Law, at: Place, sizes: Sizes, family: list[Setting], num_groups: int) -> dict[str, float]:
    """Return the model nearest to a place whose experts, and width where the sweep has that size, are whole numbers."""
    dim = number(family[0].fact("dim"))
    known = dim is not None and abs(np.log(family[0].active or 1.0) - at.n) < np.log(BEYOND)
    hidden = round(4 * (dim or 0) * sizes.width) if known else 0
    ks = [k for k in range(num_groups, 1025, num_groups) if hidden % k == 0 and (not hidden or hidden // k > 0)]
    k = min(ks or [num_groups], key=lambda one: abs(np.log(sizes.width / one) - at.g))
    s = max(1, round(float(np.exp(at.s))))
    place = Place(at.n, np.log(s), np.log(sizes.width / k), at.d)
    found: dict[str, float] = {"num_experts": s * k, "top_k": k}
    if hidden:
        found["expert_dim"] = hidden // k
    return {
        **found,
        "granularity": sizes.width / k,
        "sparsity": float(s),
        "loss": float(np.exp(law.log_loss(_one(place))[0])),
    }


def _family(settings: Sequence[Setting], n: float) -> list[Setting]:
    """Return the settings of the active size nearest to n."""
    return min(families(settings), key=lambda family: abs(np.log(family[0].active or 1.0) - n))


def _seeds(settings: Sequence[Setting]) -> list[int]:
    """Return the seeds that at least half of the settings have."""
    seeds = [row["seed"] for one in settings for row in one.runs]
    return sorted({seed for seed in seeds if 2 * seeds.count(seed) >= len(settings)}) or [0, 1, 2]


def _keep(one: Setting) -> dict[str, Any]:
    kept = {key: value for key, value in one.values.items() if value is not None and key not in EXPERT_KEYS}
    return {key: value for key, value in kept.items() if "seed" not in key}


def _warnings(fitted: Fitted, sizes: Sizes, at: Place, spread: Place, high: Array, budget: Budget) -> list[str]:
    law, found = fitted.ensemble.law, []
    for axis, what, unit in (("n", "active parameters", sizes.active_of), ("d", "tokens", None)):
        value = getattr(at, axis)
        low, top = (float(sizes.n[0]), float(sizes.n[-1])) if axis == "n" else measured(law, axis)
        factor = float(np.exp(max(value - top, low - value)))
        if factor > BEYOND:
            edge = top if value > top else low
            shown = float(np.exp(edge if unit is None else unit(edge)))
            which = "largest" if value > top else "smallest"
            known = law.form.left_out.get("alpha" if axis == "n" else "B")
            unknown = f"; what they change is not in the law ({known})" if known else ""
            found.append(
                f"extrapolated: {what} {factor:.1f} times beyond the {which} measured, {_count(shown)}{unknown}"
            )
    names = {"g": ("granularity", "finer", "coarser"), "s": ("sparsity", "less sparse", "sparser")}
    for axis, (what, below, above) in names.items():
        low, top = measured(law, axis)
        if top - low < 1e-6:
            found.append(f"{what} did not vary, so nothing can be said about it")
            continue
        if axis == "s" and budget.total is not None and np.all(high < top):
            found.append("sparsity is held down by --total: more experts would lower the loss further")
            continue
        for share, end, word in zip(at_end(getattr(spread, axis), low, top), (low, top), (below, above), strict=True):
            if share >= OFTEN:
                found.append(
                    f"{what}: the best is at the end of what was measured, {np.exp(end):.4g}, in {share:.0%} of the "
                    f"replicates; {word} may be better still"
                )
    if fitted.others:
        beside = " ".join(f"{key}={value}" for key, value in fitted.variant if value != "None") or "one"
        found.append(f"by the settings with {beside} alone; {fitted.others} others differ in more than shape (--where)")
    return found


def _count(value: float) -> str:
    from himoe.report.numbers import count

    return count(value)
