"""The shape of a configuration: what `build/` makes of it, said without building it."""

import itertools
from fractions import Fraction
from typing import Any

from himoe.config import Config, MoEConfig
from himoe.errors import ConfigError
from himoe.plan.shape import Attention, Experts, Layer, Network, Pool, Shape
from himoe.registry import GROUPED_PRESETS, GROUPED_SELECTORS, fact, having

BYTE_VOCABULARY = 257


def shape_of(config: Config, vocab_size: int | None = None) -> Shape:
    """Return the shape of a configuration's model.

    Args:
        config: the resolved configuration.
        vocab_size: V of the tokenizer in use; None for what the configuration says.

    Raises:
        ConfigError: experts of a reader's own, or a tokenizer of which only its file knows the size.
    """
    model, moe = config.model, config.moe
    count = (model.num_layers // moe.every if moe.every else 0) if moe.layers is None else len(moe.layers)
    head_dim = model.dim // model.num_heads
    attention = Attention(model.num_heads, model.num_kv_heads, head_dim, qk_norm=2 * head_dim if model.qk_norm else 0)
    layers = []
    if count < model.num_layers:
        layers.append(
            Layer(model.num_layers - count, attention, Network(model.ffn_dim, having("experts", "matrices")[model.ffn]))
        )
    if count:
        layers.append(Layer(count, attention, experts_of(moe, model.dim)))
    return Shape(
        name=config.name,
        vocab_size=_vocab_size(config) if vocab_size is None else vocab_size,
        dim=model.dim,
        tie_embeddings=model.tie_embeddings,
        layers=tuple(layers),
    )


def _vocab_size(config: Config) -> int:
    if config.data.tokenizer not in ("bpe", "byte"):
        raise ConfigError(
            f"data.tokenizer = {config.data.tokenizer!r}: its file alone knows how many tokens it has; give vocab_size"
        )
    return BYTE_VOCABULARY if config.data.tokenizer == "byte" else config.data.vocab_size


def experts_of(moe: MoEConfig, dim: int) -> Experts:
    """Return the feed-forward part of an MoE layer; raises ConfigError for experts of a reader's own."""
    places = places_of(moe)
    sizes, per_group = _groups(moe)
    groups = moe.groups or _contiguous(sizes)
    entries = [(moe.num_experts, moe.expert_dim, moe.experts)]
    if moe.pools is not None:
        entries = [(p.num_experts, p.expert_dim or moe.expert_dim, p.experts or moe.experts) for p in moe.pools]
    used = _used([number for number, *_ in entries], places, groups, per_group)
    products, parameters = _gate(moe, dim)
    return Experts(
        pools=tuple(_pool(*entry, count) for entry, count in zip(entries, used, strict=True)),
        top_k=places,
        mean_top_k=min(moe.top_k, places) if router_fact(moe, "mean_is_top_k") else places,
        gate_products=products,
        gate_parameters=parameters + moe.num_experts * _has_expert_scale(moe),
        group_sizes=sizes,
        group_top_k=per_group,
        keep_groups=_kept_groups(moe),
        shared=Network(moe.shared_dim, fact("experts", moe.experts, "matrices") or 3) if moe.shared_dim else None,
        shared_gate=moe.shared_gate,
        any_number=bool(router_fact(moe, "any_number")),
    )


def router_name(moe: MoEConfig) -> str:
    """Return the preset, or the selector of a layer without one."""
    name = moe.preset or moe.selector
    assert name is not None, "the configuration has settled one of the two"
    return name


def router_fact(moe: MoEConfig, what: str, default: Any = None) -> Any:
    """Return what the tables say of the preset, or of the selector of a layer without one."""
    return fact("selectors" if moe.preset is None else "presets", router_name(moe), what, default)


def places_of(moe: MoEConfig) -> int:
    """Return the largest number of experts that a token can have."""
    if not router_fact(moe, "any_number"):
        return moe.top_k
    options = moe.selector_options if moe.preset is None else moe.options
    return options.get("max_k") or moe.num_experts


def _groups(moe: MoEConfig) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Return the sizes of the groups, and how many experts come from each where that is fixed."""
    number = moe.num_groups
    sizes = tuple(map(len, moe.groups)) if moe.groups else (moe.num_experts // number,) * number
    if moe.preset not in GROUPED_PRESETS and moe.selector not in GROUPED_SELECTORS:
        return sizes, None
    return sizes, tuple(moe.top_k_per_group or [moe.top_k // number] * number)


def _contiguous(sizes: tuple[int, ...]) -> list[range]:
    return [range(*ends) for ends in itertools.pairwise(itertools.accumulate(sizes, initial=0))]


def _used(pools: list[int], places: int, groups: list[Any], per_group: tuple[int, ...] | None) -> list[Fraction]:
    """Return how many experts of each pool a token uses: exactly where every group lies within a pool."""
    if len(pools) > 1 and per_group is not None:
        pool_of = [pool for pool, number in enumerate(pools) for _ in range(number)]
        within = [{pool_of[expert] for expert in group} for group in groups]
        if all(len(one) == 1 for one in within):
            return [
                Fraction(sum(k for one, k in zip(within, per_group, strict=True) if pool in one))
                for pool in range(len(pools))
            ]
    return [Fraction(places * number, sum(pools)) for number in pools]


def _pool(num_experts: int, hidden_dim: int, kind: str, used: Fraction) -> Pool:
    matrices = fact("experts", kind, "matrices")
    if matrices is None:
        raise ConfigError(
            f"experts {kind!r} are your own: what they cost cannot be known without building them; plan with one of "
            f"{', '.join(having('experts', 'matrices'))}"
        )
    if matrices == 0:
        return Pool(num_experts, used, None, constant=fact("experts", kind, "learns_vector", False))
    return Pool(num_experts, used, Network(hidden_dim, matrices))


def _gate(moe: MoEConfig, dim: int) -> tuple[int, int]:
    """Return multiply-adds and parameters of the gate; one of a reader's own counts as a linear one."""
    matrix = moe.num_experts * dim
    cost = fact("gates", moe.gate, "gate_cost", lambda *_: (matrix, matrix))
    return cost(moe.num_experts, dim, moe.gate_options)


def _has_expert_scale(moe: MoEConfig) -> bool:
    return bool(moe.options.get("expert_scale", fact("presets", moe.preset, "expert_scale", False)))


def _kept_groups(moe: MoEConfig) -> int | None:
    """Return how many groups a token's experts may come from, None for all."""
    option, part = router_fact(moe, "keep_groups", ("", None))
    given = (moe.options if moe.preset else moe.selector_options).get(option)
    return given or (max(1, moe.num_groups // part) if part else None)
