"""Small language models in fp64 with a preset's router, or with every balancer that has state; one step of them.

Every entry by itself is in `every_entry.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import himoe
from himoe import Balancer, Capacity, Chain, DecoderLM, DualAscent, MoE, SwiGLUExperts, presets, registry
from himoe.balance import (
    ExpertThreshold,
    LogitCorrection,
    LossFree,
    Momentum,
    Phi,
    Quantile,
    ReluSparsity,
    Schedule,
    Switch,
    TwoLevelTerms,
    ZLoss,
)
from himoe.nn import SwiGLU

V, D, E, K, G = 17, 8, 8, 4, 4


def everything(num_experts: int = E, groups: int = G) -> Balancer:
    """Every balancer with a state of its own, and some without, in one chain with rates that show."""
    terms = TwoLevelTerms(num_experts, groups, lambda_intra=0.01, lambda_inter=0.02)
    return Chain(
        LogitCorrection(num_experts, tau=0.5, beta=0.5),
        DualAscent(terms, epsilon_inter=0.3, epsilon_intra=0.4, rate=0.1),
        Schedule(TwoLevelTerms(num_experts, groups, intra="entropy", inter="sparse"), "warmup", steps=3),
        Switch(weight=0.05),
        Phi(num_experts, weight=0.05, rate=0.3),
        ZLoss(weight=0.01),
        Quantile(num_experts, groups, selection_groups=groups),
        Schedule(Momentum(num_experts, rate=0.01), "off_after", steps=4, scales="moves"),
        ExpertThreshold(num_experts, groups, beta=0.5),
        ReluSparsity(num_experts, groups, start=0.05),
        LossFree(num_experts, rate=0.01),
    )


def _with_everything(dim: int, num_experts: int, top_k: int, **options):
    router = presets.hi_moe(dim, num_experts, top_k, expert_scale=True, **options)
    router.balancer = everything(num_experts, options["num_groups"])
    return router


OPTIONS = {"remoe": {"start": 0.01}}  # a loss that shows
PRESETS = sorted(registry.PRESETS)
ALL = ["everything", *PRESETS]


def make_router(name: str, num_experts: int = E, top_k: int = K) -> himoe.Router:
    if name == "everything":
        router = presets.hi_moe(D, num_experts, top_k, expert_scale=True, num_groups=G)
        router.balancer = everything(num_experts, G)
        return router
    groups = {"num_groups": G} if name in registry.GROUPED_PRESETS else {}
    return registry.load("presets", name)(D, num_experts, top_k, **groups, **OPTIONS.get(name, {}))


def make_model(
    name: str,
    *,
    dispatcher: Callable[[], nn.Module] | None = None,
    layers: tuple[int, ...] = (0, 1),
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> DecoderLM:
    """Two layers; those in `layers` have experts. The embedding is large, so that routing is uneven."""

    def feed_forward(layer: int) -> nn.Module:
        if layer not in layers:
            return SwiGLU(D, 12)
        experts = SwiGLUExperts(E, D, 6)
        return MoE(make_router(name), experts, dispatcher=dispatcher() if dispatcher else None)

    torch.manual_seed(seed)
    model = DecoderLM(vocab_size=V, dim=D, num_layers=2, num_heads=2, feed_forward=feed_forward)
    with torch.no_grad():
        model.embedding.weight.mul_(50)
        for layer in himoe.moe_layers(model):
            layer.router.gate.weight.mul_(50)
    return model.to(dtype)


def token_ids(rows: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model: DecoderLM, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list]:
    """Cross-entropy of the next real token plus all auxiliary losses, and the routings."""
    logits, routings = model(ids, mask)
    targets = ids[:, 1:] if mask is None else ids[:, 1:].masked_fill(~mask[:, 1:], -100)
    task = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
    return task + sum(himoe.aux_losses(model, routings).values()), routings


def optimizer_step(model: DecoderLM, *batches: Tensor) -> None:
    """Accumulate over batches, then one plain descent step."""
    model.zero_grad()
    for ids in batches:
        loss, routings = loss_of(model, ids)
        (loss / len(batches)).backward()
        himoe.observe(model, routings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    himoe.step(model)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all balancer state."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[name].double(), other[name].double(), rtol=0, atol=tolerance) for name in one
    )


def capacity(order: str = "token_major", factor: float = 0.75) -> Callable[[], nn.Module]:
    """Places so few that pairs are dropped."""
    return lambda: Capacity(factor, order=order)
