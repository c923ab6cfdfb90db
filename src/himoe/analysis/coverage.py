"""Are the intervals of the optimum honest? Sweeps drawn from a known law, analysed, and counted.

    python -m himoe.analysis.coverage

For every design, a number of synthetic sweeps: in what share of them the true best granularity and sparsity lie within
the interval that is stated (of 95 %), how wide that is against the range that was measured, and the same for the loss
at the optimum. The true law is not the fitted one: its factor stands beside an offset that one scale cannot tell, and
with `--skew` its minimum in granularity has two unlike sides.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from himoe.analysis.ensemble import bootstrap
from himoe.analysis.fitting import fit
from himoe.analysis.law import points_of
from himoe.analysis.optimum import best, measured
from himoe.analysis.runs import from_rows
from himoe.analysis.settings import settings_of
from himoe.analysis.synthetic import Truth, rows

DESIGNS: dict[str, dict[str, Any]] = {
    "9 settings, one scale": {},
    "16 settings, one scale": {"sparsities": (4, 16, 64, 256), "slices": (1, 2, 4, 16)},
    "27 settings, three scales": {"scales": ((64, 2), (96, 4), (160, 6))},
    "36 settings, two scales, two lengths": {"scales": ((64, 2), (160, 6)), "tokens": (5_000_000, 40_000_000)},
}


@dataclass(frozen=True)
class Count:
    """What came of one quantity in all sweeps of a design.

    Attributes:
        within: sweeps whose interval holds the truth.
        draws: sweeps.
        width: mean width of the interval, over that of the measured range; of the loss in nats.
        whole: share of sweeps whose interval is the whole range.
    """

    within: int
    draws: int
    width: float
    whole: float


def count(
    design: dict[str, Any], draws: int, *, replicates: int, truth: Truth, own: float, first: int = 0
) -> dict[str, Count]:
    """Return what came of the best g, of the best s and of the loss there."""
    inside: dict[str, list[bool]] = {"granularity": [], "sparsity": [], "loss": []}
    widths: dict[str, list[float]] = {name: [] for name in inside}
    for draw in range(first, first + draws):
        settings, _ = settings_of(from_rows("synthetic", rows(truth, own=own, draw=draw, **design)))
        points, used = points_of(settings)
        law = fit(points)
        ensemble = bootstrap(law, used, replicates=replicates, seed=draw)
        n, d = float(points.n.max()), float(points.d.max())
        place, found = best(law, ensemble.theta, n, d), best(law, law.theta, n, d)
        true = {"g": math.log(truth.best_granularity(math.exp(n))), "s": math.log(truth.sparsity)}
        for axis, name in (("g", "granularity"), ("s", "sparsity")):
            low, high = ensemble.interval(getattr(place, axis)[:, 0])
            ends = measured(law, axis)
            inside[name].append(low - 1e-9 <= true[axis] <= high + 1e-9)
            widths[name].append((high - low) / (ends[1] - ends[0]))
        low, high = np.exp(ensemble.interval(law.log_loss(found, ensemble.theta[:, None, :])[:, 0]))
        exact = truth.loss(math.exp(n), math.exp(float(found.s[0])), math.exp(float(found.g[0])), math.exp(d))
        inside["loss"].append(bool(low <= exact <= high))
        widths["loss"].append(high - low)
    return {
        name: Count(
            sum(inside[name]), draws, float(np.mean(widths[name])), float(np.mean(np.array(widths[name]) > 0.99))
        )
        for name in inside
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the counts of every design; 1 where one of s or g is within in fewer than 90 of 100 sweeps."""
    parser = argparse.ArgumentParser(
        prog="python -m himoe.analysis.coverage", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--draws", type=int, default=100, help="sweeps of each design (100)")
    parser.add_argument("--replicates", type=int, default=400, help="of the bootstrap (400)")
    parser.add_argument("--own", type=float, default=0.003, help="noise of a run, in log loss (0.003)")
    parser.add_argument("--skew", type=float, default=0.0, help="cubic part of the minimum in ln g (0)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first draw (0)")
    parser.add_argument("--designs", type=int, default=len(DESIGNS), help="how many of them, the small ones first (4)")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    given = parser.parse_args(arguments)
    truth = Truth(skew=given.skew)
    found: dict[str, dict[str, Count]] = {}
    for name, design in list(DESIGNS.items())[: given.designs]:
        found[name] = count(design, given.draws, replicates=given.replicates, truth=truth, own=given.own,
                            first=given.first)  # fmt: skip
        if not given.json:
            print(name)
            for what, one in found[name].items():
                width = (
                    f"{one.width:.3f} nats wide"
                    if what == "loss"
                    else (f"{one.width:.0%} of the range wide, all of it in {one.whole:.0%}")
                )
                print(f"  {what:<12} within in {one.within} of {one.draws}, {width}", flush=True)
    if given.json:
        print(json.dumps({name: {what: asdict(one) for what, one in each.items()} for name, each in found.items()}))
    poor = [one for each in found.values() for what, one in each.items() if what != "loss"]
    return int(any(one.within < 0.9 * one.draws for one in poor))


if __name__ == "__main__":
    raise SystemExit(main())
