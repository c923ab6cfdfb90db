"""Keys that follow from others, and combinations of keys that cannot work."""

from collections.abc import Mapping
from typing import Any

from himoe.config import model_rules, run_rules
from himoe.config.problems import Problem

BESIDE_A_SELECTOR = {"score": "softmax", "gate": "linear"}  # where they are not given


def broken_rules(values: Mapping[str, Any]) -> list[Problem]:
    """Return a problem for every rule that `values`, by full key, break."""
    return [*model_rules.rule.broken(values), *run_rules.rule.broken(values)]


def fill_in(moe: Any) -> Any:
    """Return the `moe` table with the keys that follow from others: preset, score, gate, num_groups and top_k."""
    if not isinstance(moe, Mapping):
        return moe
    filled = dict(moe)
    if filled.get("selector") is not None:
        filled.setdefault("preset", None)
        if filled["preset"] is None:
            filled |= {key: name for key, name in BESIDE_A_SELECTOR.items() if filled.get(key) is None}
    pools = filled.get("pools")
    if isinstance(pools, list) and pools and all(isinstance(_size(pool), int) for pool in pools):
        filled.setdefault("num_experts", sum(map(_size, pools)))
    if isinstance(filled.get("groups"), list) and filled["groups"]:
        filled.setdefault("num_groups", len(filled["groups"]))
    each = filled.get("top_k_per_group")
    if isinstance(each, list) and each and all(isinstance(k, int) for k in each):
        filled.setdefault("top_k", sum(each))
    return filled


def _size(pool: Any) -> Any:
    return pool.get("num_experts") if isinstance(pool, Mapping) else getattr(pool, "num_experts", None)


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{"train.steps": 20, …}`."""
    return {
        f"{section}.{key}": value
        for section, table in tree.items()
        if isinstance(table, Mapping)
        for key, value in table.items()
    }
