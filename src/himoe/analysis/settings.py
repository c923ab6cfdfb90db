"""Settings: the runs that differ in their seed alone, as means with Student's interval over the seeds.

Settings with the same active parameters form a *family*; those that differ in nothing but shape and length a *variant*,
which is what a law can be fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from himoe.analysis.runs import SAME_LENGTH, Left, Row, Sweep, number, split
from himoe.errors import MissingExtraError

LEVEL = 0.95
SAME_ACTIVE = 1.15
"""Settings whose active parameters, routers left out, differ by less than this factor have the same."""
SHAPE_KEYS = ("num_experts", "top_k", "expert_dim", "num_groups", "shared_dim", "steps", "batch_size", "accumulate",
              "seq_len", "warmup_steps")  # fmt: skip
"""Last parts of keys that say how large a model is or how long it learns; all of `model.` belongs to them too."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Attributes:
        value: the mean.
        n: seeds.
        low: lower end of the interval; None for one seed.
        high: its upper end.
        spread: standard deviation between seeds; None for one seed.
    """

    value: float
    n: int
    low: float | None = None
    high: float | None = None
    spread: float | None = None


def student(values: Sequence[float], level: float = LEVEL) -> Mean:
    """Return the mean of values and Student's interval; a single value has none.

    >>> mean = student([1.0, 2.0, 3.0])
    >>> mean.value, round(mean.low, 3), round(mean.high, 3)
    (2.0, -0.484, 4.484)
    """
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Mean(mean, n)
    spread = float(np.std(values, ddof=1))
    half = student_quantile((1 + level) / 2, n - 1) * spread / math.sqrt(n)
    return Mean(mean, n, mean - half, mean + half, spread)


def student_quantile(p: float, spare: int) -> float:
    """Return the quantile of Student's distribution with so many degrees of freedom."""
    try:
        from scipy.special import stdtrit  # scipy.stats takes seconds to import
    except ImportError as error:
        raise MissingExtraError("scipy", "analysis") from error
    return float(stdtrit(spare, p))


@dataclass(frozen=True)
class Setting:
    """The runs of one configuration.

    Attributes:
        name: the varied keys in words.
        values: of the varied keys.
        runs: what the means are over.
        loss: cross-entropy in nats per token.
        bits_per_byte: None where a run has none.
        cv: of the experts' load.
        max_vio: busiest expert over the mean, less 1.
        paired: the same mean loss with the interval that is left when what a seed does to all settings beside it is
            taken out; None where there is nothing to take it from.
    """

    name: str
    values: dict[str, Any]
    runs: tuple[Row, ...]
    loss: Mean
    bits_per_byte: Mean | None
    cv: Mean | None
    max_vio: Mean | None
    paired: Mean | None = None

    def fact(self, column: str) -> Any:
        """Return what all its runs have in a column."""
        return self.runs[0].get(column)

    @property
    def tokens(self) -> float:
        """Tokens it learned from."""
        return float(self.runs[0]["tokens"])

    @property
    def active(self) -> float | None:
        """Active parameters without embeddings and routers, which grow with experts that a token does not use."""
        found = number(self.fact("active_without_embeddings")) or number(self.fact("active_parameters"))
        return None if found is None else found - self._routers()

    def _routers(self) -> float:
        """Return E·D weights for each layer with experts; how many these are, idle experts tell, 3·D·F weights each."""
        columns = ("num_experts", "top_k", "expert_dim", "dim", "num_layers", "total_parameters", "active_parameters")
        values = [number(self.fact(column)) for column in columns]
        if any(value is None for value in values) or self.is_dense:
            return 0.0
        experts, top_k, hidden, dim, layers, total, active = (value or 0.0 for value in values)
        if experts > top_k:
            layers = min(layers, max(1.0, round((total - active) / (3 * dim * hidden * (experts - top_k)))))
        return experts * dim * layers

    @property
    def is_dense(self) -> bool:
        """True where no layer has experts."""
        return not self.fact("num_experts")

    @property
    def variant(self) -> tuple[tuple[str, Any], ...]:
        """What it is beside its shape and length."""
        return tuple((key, str(value)) for key, value in self.values.items() if not is_shape(key))


def is_shape(key: str) -> bool:
    """Return whether a key of the configuration says how large a model is or how long it learns."""
    return key.startswith("model.") or key.rpartition(".")[2] in SHAPE_KEYS


def settings_of(sweep: Sweep) -> tuple[list[Setting], list[Left]]:
    """Return the settings, those with the lowest loss first, and the runs that are in none."""
    groups, left = split(sweep)
    found = [_setting(sweep, rows) for rows in groups.values() if rows]
    alike = [same for family in families(found) for same in equal_tokens(family)]
    paired = {id(one): mean for same in alike for one, mean in zip(same, _paired(same), strict=True)}
    found = [replace(one, paired=paired.get(id(one))) for one in found]
    return sorted(found, key=lambda one: one.loss.value), left


def _paired(same: Sequence[Setting]) -> list[Mean | None]:
    """Return the means of settings of one size and length with the interval for comparing them with each other.

    A seed gives all of them one data order, and that often moves their losses more than anything that is compared.
    Each seed's mean over the M settings that have all seeds is taken out, and the variance multiplied by M/(M − 1) for
    that (Morey 2008, doi 10.20982/tqmp.04.2.p061).
    """
    losses = [{row["seed"]: float(row["cross_entropy"]) for row in one.runs} for one in same]
    seeds = set().union(*losses)
    whole = [one for one in losses if set(one) == seeds]
    m = len(whole)
    if m < 3 or len(seeds) < 2:
        return [None] * len(same)
    effects = {seed: float(np.mean([one[seed] for one in whole])) for seed in seeds}
    centre = float(np.mean(list(effects.values())))
    found: list[Mean | None] = []
    for one in losses:
        rest = [loss - effects[seed] + centre for seed, loss in one.items()]
        mean = float(np.mean(rest))
        widened = student([mean + (value - mean) * math.sqrt(m / (m - 1)) for value in rest])
        found.append(widened if widened.n > 1 else None)
    return found


def _setting(sweep: Sweep, rows: list[Row]) -> Setting:
    values = {key: rows[0].get(key) for key in sweep.varied}
    loss = student([float(row["cross_entropy"]) for row in rows])
    others = [mean_of(row.get(column) for row in rows) for column in ("bits_per_byte", "cv", "max_vio")]
    name = short_name(values) or str(rows[0].get("name") or rows[0]["run"])
    return Setting(name, values, tuple(rows), loss, *others)


LETTERS = {"dim": "D", "num_layers": "L", "num_experts": "E", "top_k": "K", "expert_dim": "F", "num_groups": "G"}
WITH_DIM = ("model.num_heads", "model.num_kv_heads", "model.ffn_dim")
"""Keys that follow the width."""


def short_name(values: dict[str, Any]) -> str:
    """Return varied keys in short: sizes by their letters, and what follows the width left out."""
    parts = []
    for key, value in values.items():
        last = key.rpartition(".")[2]
        if value is None or (key in WITH_DIM and values.get("model.dim") is not None):
            continue
        gap = "\N{NO-BREAK SPACE}"
        parts.append(f"{LETTERS.get(last, last)}{gap}{_word(value)}")
    return " · ".join(parts)


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def mean_of(values: Iterable[Any]) -> Mean | None:
    """Return the mean of numbers and its interval; None where one is missing, or there are none."""
    found = [number(value) for value in values]
    known = [value for value in found if value is not None]
    return student(known) if known and len(known) == len(found) else None


def families(settings: Sequence[Setting]) -> list[list[Setting]]:
    """Return the settings apart by active parameters, the smallest first; those that do not say theirs in none."""
    known = sorted((one for one in settings if one.active), key=lambda one: one.active or 0)
    apart: list[list[Setting]] = []
    for one in known:
        if apart and (one.active or 0) <= SAME_ACTIVE * (apart[-1][0].active or 0):
            apart[-1].append(one)
        else:
            apart.append([one])
    return apart


def equal_tokens(settings: Sequence[Setting]) -> list[list[Setting]]:
    """Return the settings apart by the tokens they learned from, most first."""
    apart: list[list[Setting]] = []
    for one in sorted(settings, key=lambda one: -one.tokens):
        if apart and one.tokens >= apart[-1][0].tokens * (1 - SAME_LENGTH):
            apart[-1].append(one)
        else:
            apart.append([one])
    return apart


def variants(settings: Sequence[Setting]) -> dict[tuple[tuple[str, Any], ...], list[Setting]]:
    """Return the settings with experts apart by what they are beside shape and length, the largest group first."""
    apart: dict[tuple[tuple[str, Any], ...], list[Setting]] = {}
    for one in settings:
        if not one.is_dense:
            apart.setdefault(one.variant, []).append(one)
    return dict(sorted(apart.items(), key=lambda item: -len(item[1])))
