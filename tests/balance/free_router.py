"""Routings from logits that a test writes down: the gate is the identity, so tokens are their own logits."""

from functools import partial

import torch
from torch import Tensor, nn

from himoe import Balancer, Groups, Router, Routing, registry
from himoe.balance import step_balancers
from himoe.functional.selection import top_k, top_k_per_group


def free_router(
    num_experts: int,
    k: int | tuple[int, ...],
    *,
    groups: Groups | int | None = None,
    balancer: Balancer | None = None,
    score: str = "softmax",
    renormalize: bool = True,
) -> Router:
    """A router that takes logits for tokens; with groups, k is per group. Scores by group are of four or these."""
    select = partial(top_k, k=k)
    if groups is not None:
        select = partial(top_k_per_group, groups=Groups.of(groups, num_experts), k=k)
    rule = registry.load("scores", score)
    if score in registry.GROUPED_SCORES:
        rule = partial(rule, groups=Groups.of(groups or 4, num_experts), k=1 if groups is None else k)
    return Router(
        nn.Identity(),
        select,
        num_experts=num_experts,
        score=rule,
        balancer=balancer,
        renormalize=renormalize,
    )


def route(logits: Tensor, k: int | tuple[int, ...], *, mask: Tensor | None = None, **options) -> Routing:
    """Route logits (T, E) in training mode."""
    return free_router(logits.shape[-1], k, **options)(logits, mask)


def choices(expert_ids: list[list[int]], num_experts: int, mask: list[bool] | None = None) -> Routing:
    """A routing whose tokens chose exactly these experts."""
    ids = torch.tensor(expert_ids)
    logits = torch.zeros(len(expert_ids), num_experts).scatter(1, ids, 1.0)
    return route(logits, ids.shape[1], mask=None if mask is None else torch.tensor(mask))


@torch.no_grad()
def one_step(balancer: Balancer, *routings: Routing) -> None:
    """One optimizer step over micro-batches."""
    for routing in routings:
        balancer.observe(routing)
    step_balancers([balancer])


def random_logits(seed: int, tokens: int, num_experts: int, scale: float = 1.0) -> Tensor:
    """Normal logits in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(tokens, num_experts, generator=generator, dtype=torch.float64)
