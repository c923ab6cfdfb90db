"""The fitted law: validation loss as a function of active parameters, sparsity, granularity and tokens.

    L = E + A · n^−α · s^−γ · g^λ · exp(½δ·ln²s + ½κ·ln²g + μ·ln g·ln n + ρ·ln s·ln d) + B · d^−β

with n active parameters without embeddings and routers, s = E/K, g = F/(4·D) and d tokens, each over its geometric
mean in the sweep. The frame (an offset, a power of the parameters, a power of the tokens) is that of Chinchilla
(arXiv 2203.15556). The factor of s and g is the least that can say what Slicing and Dicing found (arXiv 2605.11689):
loss falls with s (γ), perhaps not for ever (δ); the best g is a minimum in ln g that moves with the active size (κ,
μ) and not with the total (no term in s and g together); how much experts are worth depends on the tokens (ρ). The
loss of one scale after equally many tokens is then log-quadratic, with no offset to guess.

A parameter is fitted only where the settings can tell it from those before it in `TERMS`; the others are left out, with
the reason. Points are settings, means over their seeds: seeds of a setting are no further settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from himoe.analysis.runs import number
from himoe.analysis.settings import Setting, families
from himoe.errors import DataError

Array = np.ndarray

SPARE = 3
"""Settings that there must be beyond the parameters: their residuals are all that tells how good the fit is."""
NEW = 0.05
"""Share of a term's variation that the terms before it must leave unexplained."""
FLAT = 0.02
"""Standard deviation of a logarithm under which an axis does not vary."""
CHINCHILLA_BETA = 0.28
"""β where two numbers of tokens cannot give it (arXiv 2203.15556, equation 10)."""


@dataclass(frozen=True)
class Points:
    """What a law is fitted to: natural logarithms, one entry a setting.

    Attributes:
        n: active parameters without embeddings and routers, those of the smallest model of the same active size.
        s: E/K.
        g: F/(4·D).
        d: tokens.
        loss: mean log cross-entropy.
        seeds: runs behind each mean.
    """

    n: Array
    s: Array
    g: Array
    d: Array
    loss: Array
    seeds: Array

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def weights(self) -> Array:
        """By how much each counts: as the root of its seeds, 1 on average or near it."""
        return np.sqrt(self.seeds / self.seeds.mean())

    def take(self, which: Array) -> Points:
        """Return some of the points."""
        return Points(*(getattr(self, name)[which] for name in ("n", "s", "g", "d", "loss", "seeds")))


def points_of(settings: Sequence[Setting]) -> tuple[Points, list[Setting]]:
    """Return the points of the settings that say all of it, and these settings."""
    sizes = {id(one): family[0].active for family in families(settings) for one in family}
    used = [one for one in settings if _complete(one) and id(one) in sizes]
    columns = [
        [sizes[id(one)] for one in used],
        [number(one.fact("sparsity")) for one in used],
        [number(one.fact("granularity")) for one in used],
        [one.tokens for one in used],
    ]
    logs = [np.log(np.array(column, dtype=float)) for column in columns]
    return Points(*logs, loss=mean_log_losses(used), seeds=np.array([one.loss.n for one in used], dtype=float)), used


def mean_log_losses(settings: Sequence[Setting]) -> Array:
    """Return the mean log loss of each setting over its seeds, less what these seeds do to all settings.

    A setting that lacks a seed would otherwise look better or worse by that seed's luck. Seeds that fewer than half of
    the settings have are taken as they are: nothing tells their luck from their settings'. With equal seeds everywhere
    these are plain means.
    """
    runs = [(i, row["seed"], float(np.log(row["cross_entropy"]))) for i, one in enumerate(settings) for row in one.runs]
    number_of = {seed: sum(1 for _, other, _ in runs if other == seed) for _, seed, _ in runs}
    common = sorted((seed for seed, count in number_of.items() if 2 * count >= len(settings)), key=str)
    table = np.zeros((len(runs) + 1, len(settings) + len(common)))
    for row, (i, seed, _) in enumerate(runs):
        table[row, i] = 1
        if seed in common:
            table[row, len(settings) + common.index(seed)] = 1
    table[-1, len(settings) :] = 1  # the seeds' parts sum to nothing
    losses = np.array([loss for _, _, loss in runs] + [0.0])
    return np.linalg.lstsq(table, losses, rcond=None)[0][: len(settings)]


def _complete(one: Setting) -> bool:
    sizes = [number(one.fact(column)) for column in ("sparsity", "granularity")]
    return not one.is_dense and all(value is not None and value > 0 for value in sizes) and one.loss.value > 0


Column = Callable[[Any], Any]
TERMS: dict[str, tuple[str, Column]] = {
    "A": ("a constant", lambda x: np.ones_like(x.n)),
    "alpha": ("active parameters", lambda x: -x.n),
    "gamma": ("sparsity", lambda x: -x.s),
    "lambda": ("granularity", lambda x: x.g),
    "B": ("tokens", lambda x: -x.d),
    "kappa": ("a minimum in granularity", lambda x: x.g**2 / 2),
    "delta": ("a bend in sparsity", lambda x: x.s**2 / 2),
    "beta": ("the exponent of tokens", lambda x: x.d**2 / 2),
    "E": ("the offset", lambda x: x.n**2 / 2),
    "mu": ("a minimum in granularity that moves with active parameters", lambda x: x.g * x.n),
    "rho": ("sparsity worth more with more tokens", lambda x: x.s * x.d),
}
"""What each parameter stands for and, for B, β and E, the column that would tell it in a log-linear law."""
OUTSIDE = ("E", "B", "beta")
AXES = {"alpha": "n", "gamma": "s", "lambda": "g", "B": "d", "kappa": "g", "delta": "s", "beta": "d", "E": "n",
        "mu": "gn", "rho": "sd"}  # fmt: skip
"""The axes that must vary."""
NEEDS = {"kappa": "lambda", "mu": "lambda", "delta": "gamma", "rho": "gamma", "beta": "B", "E": "alpha"}
"""Terms that mean nothing without another."""
AXIS_NAMES = {"n": "active parameters", "s": "sparsity", "g": "granularity", "d": "tokens"}


@dataclass(frozen=True)
class Form:
    """Which parameters a law has.

    Attributes:
        terms: those inside the exponential, A first, then of E, B and beta those that are fitted.
        left_out: of every other one, why.
        centre: of n, s, g and d: the means of their logarithms.
    """

    terms: tuple[str, ...]
    left_out: dict[str, str]
    centre: dict[str, float]

    def centred(self, at: Any) -> Any:
        """Return the logarithms less their centre."""
        return _Centred(*(getattr(at, axis) - self.centre[axis] for axis in "nsgd"))


@dataclass(frozen=True)
class _Centred:
    n: Any
    s: Any
    g: Any
    d: Any


def choose_form(points: Points) -> Form:
    """Return the law that the points can bear.

    Raises:
        DataError: too few settings.
    """
    if len(points) < SPARE + 2:
        raise DataError(
            f"a law needs at least {SPARE + 2} settings with experts that differ in shape or tokens, there are "
            f"{len(points)}; sweep more values of moe.num_experts and moe.expert_dim"
        )
    centre = {axis: float(np.mean(getattr(points, axis))) for axis in "nsgd"}
    form = Form((), {}, centre)
    x = form.centred(points)
    columns = [np.ones(len(points))]
    chosen, left_out = ["A"], {}
    for name, (meaning, column) in TERMS.items():
        if name == "A":
            continue
        values = column(x)
        reason = _redundant(values, columns, x, name)
        if (
            reason
            and name == "E"
            and "alpha" in chosen
            and (bends := [one for one in ("kappa", "delta") if one in chosen])
        ):
            # Two sizes tell an offset too: it is what makes a bend of log loss flatter in the larger one.
            values = TERMS[bends[0]][1](x) * x.n
            reason = _redundant(values, columns, x, name)
        if not reason and len(chosen) + 1 > len(points) - SPARE:
            reason = f"{len(points)} settings are too few for it"
        if not reason and (first := NEEDS.get(name)) and first not in chosen:
            reason = f"the law has no term of {TERMS[first][0]}"
        if reason:
            left_out[name] = f"{meaning}: {reason}"
        else:
            chosen.append(name)
            columns.append(values)
    if "B" in chosen and "beta" not in chosen:
        left_out["beta"] += f"; fixed at {CHINCHILLA_BETA}, Chinchilla's"
    inside = [name for name in chosen if name not in OUTSIDE]
    return Form((*inside, *(name for name in OUTSIDE if name in chosen)), left_out, centre)


def _redundant(values: Array, columns: list[Array], x: Any, name: str) -> str:
    """Return why a column tells nothing new, or an empty text."""
    flat = [AXIS_NAMES[axis] for axis in AXES[name] if np.std(getattr(x, axis)) < FLAT]
    if flat:
        one_word = len(flat) == 1 and flat[0] in ("sparsity", "granularity")
        return f"{' and '.join(flat)} {'does' if one_word else 'do'} not vary"
    moved = values - values.mean()
    basis = np.column_stack(columns)
    rest = moved - basis @ np.linalg.lstsq(basis, moved, rcond=None)[0]
    if np.linalg.norm(rest) < NEW * np.linalg.norm(moved):
        return (
            "it goes along with the others"
            if len(AXES[name]) > 1 or name in "alpha gamma lambda B"
            else (f"too few different values of {AXIS_NAMES[AXES[name]]}")
        )
    return ""


class Model:
    """The law as a function of its parameters: log loss and its derivatives."""

    def __init__(self, form: Form, at: Any) -> None:
        self.form, self.x = form, form.centred(at)
        self.inside = [name for name in form.terms if name not in OUTSIDE]
        self.columns = np.stack(np.broadcast_arrays(*(TERMS[name][1](self.x) for name in self.inside)), axis=-1)

    def parts(self, theta: Array) -> tuple[list[tuple[str, Array]], Array]:
        """Return the logs of the summands and of their sum, log loss; `theta` (…, P) gives (…, points)."""
        value = dict(zip(self.form.terms, np.moveaxis(theta, -1, 0), strict=True))
        logs = [("inside", theta[..., : len(self.inside)] @ self.columns.T)]
        zero = np.zeros_like(logs[0][1])
        if "E" in value:
            logs.append(("E", value["E"][..., None] + zero))
        if "B" in value:
            beta = value["beta"][..., None] if "beta" in value else CHINCHILLA_BETA
            logs.append(("B", value["B"][..., None] - beta * self.x.d + zero))
        return logs, np.logaddexp.reduce([one for _, one in logs], axis=0)

    def __call__(self, theta: Array) -> Array:
        """Return log loss at every point."""
        return self.parts(theta)[1]

    def derivatives(self, theta: Array) -> Array:
        """Return d log loss / d theta, (…, points, P)."""
        logs, whole = self.parts(theta)
        share = {name: np.exp(one - whole)[..., None] for name, one in logs}
        found = [share["inside"] * self.columns]
        found += [share[name] for name in ("E", "B") if name in share]
        if "beta" in self.form.terms:
            found.append(-self.x.d[:, None] * share["B"])
        return np.concatenate(found, axis=-1)

    def box(self, lowest: float, highest: float) -> tuple[Array, Array]:
        """Return the bounds of the parameters, from the least and the greatest log loss."""
        box = {"E": (lowest - 6, lowest), "B": (lowest - 9, highest + 3), "beta": (0.02, 2.0)}
        low, high = np.array([box.get(name, (-50.0, 50.0)) for name in self.form.terms]).T
        return low, high


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes:
        form: which parameters it has.
        theta: their values; E and B as logarithms, A too.
        points: what it was fitted to.
        residuals: log loss less the fit's.
        leverage: of every point, how much of its own value the fit follows, 0 to 1.
        scale: the residuals' standard deviation, on as many as are to spare.
        threshold: Huber's.
    """

    form: Form
    theta: Array
    points: Points
    residuals: Array
    leverage: Array
    scale: float
    threshold: float

    def log_loss(self, at: Any, theta: Array | None = None) -> Array:
        """Return log loss at points, for these parameters or others (…, P)."""
        return Model(self.form, at)(self.theta if theta is None else theta)

    @property
    def spare(self) -> int:
        """Settings beyond the parameters."""
        return len(self.points) - len(self.theta)

    def value(self, name: str, theta: Array | None = None) -> Any:
        """Return a parameter as it stands in the formula, None where it is left out."""
        if name not in self.form.terms:
            return CHINCHILLA_BETA if name == "beta" and "B" in self.form.terms else None
        raw = (self.theta if theta is None else theta)[..., self.form.terms.index(name)]
        return np.exp(raw) if name in ("A", "E", "B") else raw
