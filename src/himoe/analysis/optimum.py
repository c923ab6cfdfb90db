"""The best granularity and sparsity of a law, and where they lie in its replicates.

The law's factor of s and g is a parabola in each logarithm, so within what was measured the best of each is its vertex,
or an end of the range where the vertex lies beyond or the parabola opens downwards. Active parameters and tokens, where
a budget leaves them open, are tried over a fine row of values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from himoe.analysis.law import Form, Law

Array = np.ndarray


@dataclass(frozen=True)
class Place:
    """Natural logarithms of active parameters n, sparsity s, granularity g and tokens d; arrays of one shape."""

    n: Any
    s: Any
    g: Any
    d: Any


def measured(law: Law, axis: str) -> tuple[float, float]:
    """Return the least and greatest logarithm of an axis that was measured."""
    values = getattr(law.points, axis)
    return float(values.min()), float(values.max())


def vertex(linear: Array, curved: Array, low: Any, high: Any) -> Array:
    """Return where linear·x + ½·curved·x² is least between low and high.

    >>> vertex(np.array([-1.0, 1.0, 1.0]), np.array([2.0, 0.0, -1.0]), -3.0, 3.0).tolist()
    [0.5, -3.0, -3.0]
    """
    inner = -linear / np.where(curved > 0, curved, 1.0)
    ends = linear * high + curved * high**2 / 2 < linear * low + curved * low**2 / 2
    return np.where(curved > 0, np.clip(inner, low, high), np.where(ends, high, low))


def best(law: Law, theta: Array, n: Any, d: Any, high_s: Any = None, reach: float = 0.0) -> Place:
    """Return the best s and g for active parameters n and tokens d, each a logarithm.

    Args:
        law: the law.
        theta: (P,) or (replicates, P); results have that first axis too.
        n: active parameters, a number or (places,).
        d: tokens, likewise.
        high_s: largest sparsity that is allowed; the largest measured by default, and never more.
        reach: how far beyond what was measured the best may lie, in logarithms.
    """
    form: Form = law.form
    value = {name: theta[..., form.terms.index(name), None] for name in form.terms}
    zero = np.zeros((*theta.shape[:-1], np.size(n)))
    n, d = np.atleast_1d(n) + zero, np.atleast_1d(d) + zero
    ranges = {axis: (low - reach, high + reach) for axis in "sg" for low, high in [measured(law, axis)]}
    centre = form.centre
    g_linear = value.get("lambda", zero) + value.get("mu", zero) * (n - centre["n"])
    s_linear = -value.get("gamma", zero) + value.get("rho", zero) * (d - centre["d"])
    low, high = (end - centre["g"] for end in ranges["g"])
    g = vertex(g_linear, value.get("kappa", zero) + zero, low, high) + centre["g"]
    s_low, s_high = ranges["s"]
    top = s_high if high_s is None else np.clip(high_s, s_low, s_high)
    s = vertex(s_linear, value.get("delta", zero) + zero, s_low - centre["s"], top - centre["s"]) + centre["s"]
    return Place(n, s, g, d)


def at_end(values: Array, low: float, high: float) -> tuple[float, float]:
    """Return the shares of values at the low and at the high end of a range."""
    near = 1e-9 + 1e-6 * (high - low)
    return float(np.mean(values <= low + near)), float(np.mean(values >= high - near))
