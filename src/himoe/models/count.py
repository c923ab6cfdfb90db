"""Exact parameter counts of a real model, in the three conventions in use."""

from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from himoe.nn import PooledExperts, Router, moe_layers
from himoe.registry import GROUPED_SELECTORS


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters; a tied embedding counts once.

    Attributes:
        total: all of them.
        active: what one token uses, both embeddings included; of the routed experts, see `parameter_counts`.
        active_without_input_embedding: `active` without the input embedding, unless the head is tied to it.
        active_without_embeddings: `active` without input embedding and head.
    """

    total: int
    active: int
    active_without_input_embedding: int
    active_without_embeddings: int


def parameter_counts(model: nn.Module) -> ParameterCounts:
    """Count a model that has `embedding` and `head` modules, such as `DecoderLM`; works on the meta device.

    Of a pool of n experts with P parameters together (all experts of a layer, but for `PooledExperts`), a token uses
    P·k/n. Where the selector takes k' of every group and each group lies within a pool, k is the sum of the pool's k'.
    Else it is the number expected when all E experts of the layer are used alike, k = K·n/E; K is the largest number of
    experts that a token can have. Zero and copy experts have no parameters and add nothing.
    """
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for layer in moe_layers(model):
        experts = layer.experts
        pools, sizes = [experts], (layer.router.num_experts,)
        if isinstance(experts, PooledExperts):
            pools, sizes = list(experts.pools), experts.sizes
        routed = [sum(p.numel() for p in pool.parameters()) for pool in pools]
        used = _experts_per_token(layer.router, sizes)
        idle += sum(routed) - int(sum(p * k / n for p, k, n in zip(routed, used, sizes, strict=True)))
    embedding: nn.Parameter = model.embedding.weight  # type: ignore[assignment]
    head: nn.Parameter = model.head.weight  # type: ignore[assignment]
    tied = embedding is head
    active = total - idle
    without_input = active if tied else active - embedding.numel()
    return ParameterCounts(
        total=total,
        active=active,
        active_without_input_embedding=without_input,
        active_without_embeddings=without_input - head.numel(),
    )


def _experts_per_token(router: Router, sizes: tuple[int, ...]) -> list[Fraction]:
    """Return how many experts of each pool a token uses, the pools being given by their numbers of experts."""
    pool_of = [pool for pool, size in enumerate(sizes) for _ in range(size)]
    if router.selector_name in GROUPED_SELECTORS:
        options = router.selector.keywords  # type: ignore[attr-defined]  # such a selector has its groups bound
        groups, k = options["groups"], options["k"]
        per_group = (k,) * groups.num_groups if isinstance(k, int) else k
        pools = [{pool_of[expert] for expert in members} for members in groups.members]
        if all(len(within) == 1 for within in pools):
            return [
                Fraction(sum(k_g for within, k_g in zip(pools, per_group, strict=True) if pool in within))
                for pool in range(len(sizes))
            ]
    return [Fraction(router.top_k * size, router.num_experts) for size in sizes]
