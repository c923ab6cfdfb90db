"""Families of one size: number, width and choices of experts so that active, or total, parameters stay (2605.11689).

With granularity g = F/(4·D), width W = K·g + g_shared and sparsity s = E/K:

- `keep = "active"`: W stays. F = 4·D·g, K = (W − g_shared)/g, E = s·W/g: with a shared expert E is kept and K reduced.
- `keep = "total"`: E·g + g_shared stays as it is in the configuration; K = E/s.

Gates grow with E, so active parameters stay but for those of the router. Every number must come out whole.
"""

import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from himoe.config import Config
from himoe.errors import ConfigError
from himoe.plan import parameters, shape_of
from himoe.sweep.spec import Family

Size = Fraction | list[Fraction]


Member = tuple[Size | None, Fraction | None, Fraction | None]
"""Granularity, sparsity and granularity of the shared expert; None: as in the configuration."""


def members(family: Family) -> Iterator[tuple[dict[str, Any], Member]]:
    """Yield what a member is called by, and the member."""
    axes = {"granularity": family.granularity, "sparsity": family.sparsity, "shared": family.shared}
    for values in itertools.product(*(axis or [None] for axis in axes.values())):
        called = {
            name: "+".join(map(str, value)) if isinstance(value, list) else value
            for name, value in zip(axes, values, strict=True)
            if value is not None
        }
        granularity: Any = values[0]
        size = [Fraction(each) for each in granularity] if isinstance(granularity, list) else _fraction(granularity)
        yield called, (size, _fraction(values[1]), _fraction(values[2]))


def _fraction(value: Any) -> Fraction | None:
    return None if value is None else Fraction(value)


def sizes(family: Family, config: Config, member: Member) -> dict[str, Any]:
    """Return the keys of the `moe` section that make `config` this member of the family.

    Raises ConfigError where a number does not come out whole, or the configuration has no experts of one kind.
    """
    moe, dim = config.moe, config.model.dim
    if not config.moe_layer_indices or moe.pools is not None:
        raise ConfigError("[family] needs a recipe with experts of one size (moe.every, moe.pools)")
    granularity, sparsity, shared = member
    unit = 4 * dim
    base = Fraction(moe.expert_dim, unit)
    g_shared = Fraction(moe.shared_dim, unit) if shared is None else shared
    s = Fraction(moe.num_experts, moe.top_k) if sparsity is None else sparsity
    if s < 1:
        raise ConfigError(
            f"[family] sparsity = {s}: must be ≥ 1, since a token cannot have more experts than there are"
        )
    width = moe.top_k * base + Fraction(moe.shared_dim, unit) if family.width is None else Fraction(family.width)
    total = moe.num_experts * base + Fraction(moe.shared_dim, unit)
    pools = granularity if isinstance(granularity, list) else [base if granularity is None else granularity]
    found = []
    for g in pools:
        if not g:
            raise ConfigError("[family] granularity = 0: must be above 0")
        if family.keep == "active":
            number, top_k = s * width / g / len(pools), (width - g_shared) / g / len(pools)
        else:
            number = (total - g_shared) / g / len(pools)
            top_k = number / s
        found.append(
            (_whole("moe.num_experts", number), _whole("moe.top_k", top_k), _whole("moe.expert_dim", unit * g))
        )
    keys: dict[str, Any] = {} if shared is None else {"shared_dim": _whole("moe.shared_dim", unit * g_shared, least=0)}
    return keys | (_one_size(*found[0]) if len(found) == 1 else _pools(found))


def _one_size(number: int, top_k: int, hidden: int) -> dict[str, Any]:
    return {"num_experts": number, "top_k": top_k, "expert_dim": hidden}


def _pools(found: list[tuple[int, int, int]]) -> dict[str, Any]:
    """Return pools with a router each: own choices, own softmax, weights in proportion to the pools' K."""
    ends = [*itertools.accumulate((number for number, *_ in found), initial=0)]
    return {
        "pools": [{"num_experts": number, "expert_dim": hidden} for number, _, hidden in found],
        "num_experts": ends[-1],
        "num_groups": len(found),
        "groups": [[*range(*pair)] for pair in itertools.pairwise(ends)],
        "top_k_per_group": [top_k for _, top_k, _ in found],
        "top_k": sum(top_k for _, top_k, _ in found),
        "selector": "top_k_per_group",
        "score": "softmax_per_group",
    }


def _whole(key: str, value: Fraction, *, least: int = 1) -> int:
    if value.denominator != 1 or value < least:
        raise ConfigError(
            f"[family] leads to {key} = {float(value):g}, which must be a whole number ≥ {least}; choose granularity, "
            "sparsity, shared and width so that it is"
        )
    return int(value)


def kept_parameters(family: Family, config: Config) -> int:
    """Return what the family keeps, as himoe.plan counts it, without the router; any vocabulary will do."""
    counts = parameters(shape_of(config, vocab_size=1))
    of = counts.active if family.keep == "active" else counts.total
    return of - counts.by_role.get("router", 0)
