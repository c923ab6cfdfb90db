"""What the keys of the model and of its mixture-of-experts layers must be to each other."""

from collections.abc import Iterable
from typing import Any

from himoe.config.rulebook import Rulebook, multiple
from himoe.registry import GROUPED_PRESETS, GROUPED_SCORES, GROUPED_SELECTORS

rule = Rulebook()


def _grouped(preset: str | None, selector: str | None) -> bool:
    return preset in GROUPED_PRESETS or selector in GROUPED_SELECTORS


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


@rule("model.dim", "model.num_heads")
def _heads_divide_width(dim: int, num_heads: int) -> str | None:
    return multiple(dim, num_heads, "model.num_heads")


@rule("model.dim", "model.num_heads")
def _head_width_is_even(dim: int, num_heads: int) -> str | None:
    if dim % num_heads or dim // num_heads % 2 == 0:
        return None
    return f"gives heads of width {dim // num_heads}; rotary positions need an even width"


@rule("model.num_heads", "model.num_kv_heads")
def _kv_heads_divide_heads(num_heads: int, num_kv_heads: int) -> str | None:
    return multiple(num_heads, num_kv_heads, "model.num_kv_heads")


@rule("moe.layers", "model.num_layers")
def _layers_exist(layers: list[int] | None, num_layers: int) -> str | None:
    layers = layers or []
    if len(set(layers)) < len(layers):
        return "names a layer twice"
    if any(not 0 <= layer < num_layers for layer in layers):
        return f"layers go from 0 to {num_layers - 1} (model.num_layers = {num_layers})"
    return None


@rule("moe.every", "model.num_layers", "moe.layers")
def _every_meets_a_layer(every: int, num_layers: int, layers: list[int] | None) -> str | None:
    if layers is None and every > num_layers:
        return f"must be ≤ model.num_layers ({num_layers}), or 0 for a model without experts"
    return None


@rule("moe.num_experts", "moe.num_groups", "moe.groups")
def _groups_divide_experts(num_experts: int, num_groups: int, groups: list[list[int]] | None) -> str | None:
    return multiple(num_experts, num_groups, "moe.num_groups") if groups is None else None


@rule("moe.top_k", "moe.num_experts")
def _enough_experts(top_k: int, num_experts: int) -> str | None:
    return f"must be ≤ moe.num_experts ({num_experts})" if top_k > num_experts else None


@rule(
    "moe.top_k", "moe.num_experts", "moe.num_groups", "moe.groups", "moe.top_k_per_group", "moe.preset", "moe.selector"
)
def _top_k_in_every_group(
    top_k: int,
    num_experts: int,
    num_groups: int,
    groups: list[list[int]] | None,
    each: list[int] | None,
    preset: str | None,
    selector: str | None,
) -> str | None:
    if not _grouped(preset, selector) or each is not None or top_k > num_experts:
        return None
    if uneven := multiple(top_k, num_groups, "moe.num_groups"):
        return f"{uneven}: {preset or selector!r} takes equally many from each group"
    smallest = min(map(len, groups or []), default=top_k)
    if top_k // num_groups > smallest:
        return f"takes {top_k // num_groups} experts from each group, and the smallest group has {smallest}"
    return None


@rule("moe.groups", "moe.num_experts")
def _groups_hold_every_expert(groups: list[list[int]] | None, num_experts: int) -> str | None:
    listed = sorted(expert for group in groups or [] for expert in group)
    if groups is None or (len(listed) == num_experts and listed == list(range(num_experts))):
        return None
    return f"must hold each expert from 0 to {num_experts - 1} exactly once (moe.num_experts = {num_experts})"


@rule("moe.num_groups", "moe.groups")
def _number_of_groups(num_groups: int, groups: list[list[int]] | None) -> str | None:
    if not groups or num_groups == len(groups):
        return None
    return f"moe.groups lists {len(groups)} groups; leave moe.num_groups out"


@rule("moe.groups", "moe.preset", "moe.selector", "moe.balancers")
def _groups_need_what_goes_by_group(
    groups: list[list[int]] | None, preset: str | None, selector: str | None, balancers: list[dict[str, Any]]
) -> str | None:
    if groups is None or any(balancer.get("per_group") for balancer in balancers):
        return None
    refused = _only_grouped(preset, selector)
    return refused and f"{refused}; or a balancer with per_group = true"


@rule("moe.top_k_per_group", "moe.preset", "moe.selector")
def _top_k_per_group_needs_grouped_selection(
    each: list[int] | None, preset: str | None, selector: str | None
) -> str | None:
    return _only_grouped(preset, selector) if each is not None else None


def _only_grouped(preset: str | None, selector: str | None) -> str | None:
    own = next((name for name in (preset, selector) if name and ":" in name), None)
    if own or _grouped(preset, selector):
        return None
    return f"needs selection by group: a preset of {_listed(GROUPED_PRESETS)}, or selector {_listed(GROUPED_SELECTORS)}"


@rule("moe.top_k_per_group", "moe.top_k", "moe.num_groups", "moe.groups", "moe.num_experts")
def _top_k_per_group_fits(
    each: list[int] | None, top_k: int, num_groups: int, groups: list[list[int]] | None, num_experts: int
) -> str | None:
    if each is None:
        return None
    if len(each) != (number := len(groups) if groups else num_groups):
        return f"must have one entry for each of the {number} groups"
    sizes = [len(group) for group in groups] if groups else [num_experts // num_groups] * num_groups
    if any(k > size for k, size in zip(each, sizes, strict=True)):
        return f"must be ≤ the sizes of the groups ({', '.join(map(str, sizes))})"
    if sum(each) != top_k:
        return f"sums to {sum(each)}, but moe.top_k is {top_k}; leave moe.top_k out"
    return None


@rule("moe.selector", "moe.preset")
def _preset_or_selector(selector: str | None, preset: str | None) -> str | None:
    if selector is not None and preset is not None:
        return f"cannot stand beside moe.preset ({preset!r}), which brings its own; give one of the two"
    if selector is None and preset is None:
        return "must be given where moe.preset is none; give one of the two"
    return None


@rule("moe.score", "moe.preset", "moe.selector")
def _score_beside_selector(score: str | None, preset: str | None, selector: str | None) -> str | None:
    if score is None or preset is None or selector is not None:
        return None
    return f"cannot stand beside moe.preset ({preset!r}), which brings its own; it belongs to moe.selector"


@rule("moe.score", "moe.preset", "moe.selector")
def _grouped_score_needs_grouped_selection(score: str | None, preset: str | None, selector: str | None) -> str | None:
    return _only_grouped(preset, selector) if score in GROUPED_SCORES and selector is not None else None


@rule("moe.options", "moe.preset")
def _options_of_a_preset(options: dict[str, Any], preset: str | None) -> str | None:
    if options and preset is None:
        return "are a preset's, and moe.preset is none; a balancer's options stand in its own entry of moe.balancers"
    return None


@rule("moe.selector_options", "moe.selector")
def _options_of_a_selector(options: dict[str, Any], selector: str | None) -> str | None:
    return (
        "belong to moe.selector, which is none; a preset's options stand in moe.options"
        if options and selector is None
        else None
    )


@rule("moe.gate", "moe.preset", "moe.selector")
def _gate_beside_selector(gate: str | None, preset: str | None, selector: str | None) -> str | None:
    if gate is None or preset is None or selector is not None:
        return None
    return f"cannot stand beside moe.preset ({preset!r}), which brings its own; it belongs to moe.selector"


@rule("moe.gate_options", "moe.preset")
def _options_of_a_gate(options: dict[str, Any], preset: str | None) -> str | None:
    if options and preset is not None:
        return f"belong to moe.gate, and moe.preset ({preset!r}) brings its own gate; its options stand in moe.options"
    return None


@rule("moe.pools", "moe.num_experts")
def _pools_hold_every_expert(pools: list[dict[str, Any]] | None, num_experts: int) -> str | None:
    if pools is None or (held := sum(pool["num_experts"] for pool in pools)) == num_experts:
        return None
    return f"hold {held} experts, but moe.num_experts is {num_experts}; leave moe.num_experts out"


@rule("moe.shared_gate", "moe.shared_dim")
def _gate_of_a_shared_expert(shared_gate: bool, shared_dim: int) -> str | None:
    return "needs a shared expert: set moe.shared_dim" if shared_gate and not shared_dim else None


@rule("moe.capacity_order", "moe.capacity_factor")
def _order_of_a_capacity(order: str, factor: float | None) -> str | None:
    return "orders the places of a capacity: set moe.capacity_factor" if order != "token_major" and not factor else None


@rule("moe.balancers", "moe.num_groups")
def _balancers_per_group(balancers: list[dict[str, Any]], num_groups: int) -> str | None:
    if num_groups > 1 or not any(balancer.get("per_group") for balancer in balancers):
        return None
    return "asks for a balancer per group, and there is one group: set moe.num_groups or moe.groups"
