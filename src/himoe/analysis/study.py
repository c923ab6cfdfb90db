"""A sweep, analysed: its settings, and the law of the largest group of them that differ in shape and length alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from himoe.analysis.ensemble import REPLICATES, Ensemble, HeldOut, bootstrap, leave_largest_out, leave_one_out
from himoe.analysis.fitting import fit
from himoe.analysis.law import points_of
from himoe.analysis.runs import Left, Sweep
from himoe.analysis.settings import Setting, settings_of, variants
from himoe.errors import DataError


@dataclass(frozen=True)
class Fitted:
    """A law with all that a reader needs to judge it.

    Attributes:
        ensemble: the law and its replicates.
        settings: what its points are, in their order.
        held_out: its errors on settings left out.
        variant: what the settings are beside their shape.
        others: settings with experts that are of other variants.
    """

    ensemble: Ensemble
    settings: list[Setting]
    held_out: list[HeldOut]
    variant: tuple[tuple[str, str], ...]
    others: int


@dataclass(frozen=True)
class Study:
    """A sweep, analysed.

    Attributes:
        sweep: what was read.
        settings: the lowest loss first.
        left: runs that no mean holds.
        fitted: the law; None where there are too few settings.
        no_law: why there is none.
    """

    sweep: Sweep
    settings: list[Setting]
    left: list[Left]
    fitted: Fitted | None
    no_law: str = ""


def study(sweep: Sweep, *, replicates: int = REPLICATES, seed: int = 0) -> Study:
    """Analyse a sweep; equal arguments give equal results.

    Raises:
        DataError: no run of it is done.
    """
    settings, left = settings_of(sweep)
    if not settings:
        at = f" at {sweep.at}" if sweep.at else ""
        first = f": {left[0].name or left[0].run} {left[0].reason}" if left else ""
        raise DataError(f"{sweep.name}: none of {len(sweep.rows)} runs can be used{at}{first}")
    try:
        return Study(sweep, settings, left, fit_law(settings, replicates=replicates, seed=seed))
    except DataError as error:
        return Study(sweep, settings, left, None, str(error))


def fit_law(settings: list[Setting], *, replicates: int = REPLICATES, seed: int = 0) -> Fitted:
    """Fit the law of the largest variant.

    Raises:
        DataError: too few settings.
    """
    groups = variants(settings)
    if not groups:
        raise DataError("a law needs settings with experts, and there are none")
    variant, members = next(iter(groups.items()))
    points, used = points_of(members)
    law = fit(points)
    held_out = [leave_one_out(law)]
    if (largest := leave_largest_out(law)) is not None:
        held_out.append(largest)
    ensemble = bootstrap(law, used, replicates=replicates, seed=seed)
    others = sum(map(len, groups.values())) - len(members)
    return Fitted(ensemble, used, held_out, variant, others)


def formula(fitted: Fitted) -> str:
    """Return the law as fitted, with what each variable is divided by."""
    law = fitted.ensemble.law
    value = {name: law.value(name) for name in law.form.terms}
    inside = [f"{value['A']:.4g}"]
    powers = {"alpha": ("n", -1), "gamma": ("s", -1), "lambda": ("g", 1)}
    inside += [f"{axis}^{sign * value[name]:.3g}" for name, (axis, sign) in powers.items() if name in value]
    curves = {"delta": ("ln²s", 0.5), "kappa": ("ln²g", 0.5), "mu": ("ln g·ln n", 1), "rho": ("ln s·ln d", 1)}
    bends = [f"{factor * value[name]:+.3g}·{text}" for name, (text, factor) in curves.items() if name in value]
    text = " · ".join(inside) + (f" · exp({' '.join(bends)})" if bends else "")
    if "E" in value:
        text = f"{value['E']:.4g} + {text}"
    if "B" in value:
        text += f" + {value['B']:.3g} · d^-{law.value('beta'):.3g}"
    centre = {axis: float(np.exp(mean)) for axis, mean in law.form.centre.items()}
    over = {"n": "active parameters without embeddings and routers", "s": "E/K", "g": "F/(4·D)", "d": "tokens"}
    used = [axis for axis in "nsgd" if any(f"{axis}^" in part or f"ln {axis}" in part or f"²{axis}" in part
                                          for part in text.split(" "))]  # fmt: skip
    where = ", ".join(f"{axis} = {over[axis]} / {centre[axis]:.4g}" for axis in used)
    return f"L = {text}" + (f", with {where}" if where else "")
