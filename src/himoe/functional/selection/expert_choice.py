"""`expert_choice`: experts choose tokens, not tokens experts (Zhou et al., arXiv 2202.09368).

Every expert takes its C = floor(capacity_factor·K·T/E) best tokens, T the real ones of the batch, at least 1 and at
most T. All experts get the same load by construction; a token gets as many experts as chose it, perhaps none.

Not causal: whether an expert takes a token depends on the scores of later ones. The paper's weights are the scores as
they are, softmax over the experts.

Deviation: `max_k` may bound the experts of a token (the paper's own variant solves a linear programme); the token then
keeps its best, and the experts that lose it are not refilled.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from himoe.functional.dispatch import capacity
from himoe.functional.selection.base import Selection, best_of, check_top_k, places, real_tokens, refuse
from himoe.types import RouterContext


def expert_choice(
    scores: Float[Tensor, "T E"],
    context: RouterContext,
    *,
    k: int,
    capacity_factor: float = 1.0,
    max_k: int | None = None,
) -> Selection:
    """Every expert takes its best tokens, equally many; not causal (arXiv 2202.09368).

    Args:
        scores: (T, E).
        context: its mask says which tokens are real; padding is never taken.
        k: mean number of experts of a token, where capacity_factor is 1.
        capacity_factor: multiplies it.
        max_k: most experts of a token; default all.

    Raises:
        ConfigError: k, capacity_factor or max_k out of range.
    """
    taken = wanted(scores, context, k=k, capacity_factor=capacity_factor)
    return best_of(scores, taken, places(max_k, scores.shape[-1], "expert_choice"))


def wanted(
    scores: Float[Tensor, "T E"], context: RouterContext, *, k: int, capacity_factor: float = 1.0
) -> Bool[Tensor, "T E"]:
    """Mark the tokens that every expert takes."""
    num_tokens, num_experts = scores.shape
    check_top_k(num_experts, k)
    if not 0 < capacity_factor < math.inf:
        refuse("expert_choice", f"capacity_factor = {capacity_factor} must be above 0 and finite")
    real = real_tokens(scores, context)
    each = torch.minimum(capacity(real, num_experts, k, capacity_factor), real)
    # With padding fewer are taken than the shapes have room for; one more forgives rounding.
    room = min(num_tokens, math.floor(num_tokens * k * capacity_factor / num_experts) + 1)
    offered = scores if context.mask is None else scores.where(context.mask[:, None], -torch.inf)
    best = offered.topk(room, dim=0).indices
    is_taken = torch.arange(room, device=scores.device)[:, None] < each
    return torch.zeros_like(scores, dtype=torch.bool).scatter(0, best, is_taken.expand_as(best))


expert_choice.wanted = wanted  # type: ignore[attr-defined]
expert_choice.causal = False  # type: ignore[attr-defined]
expert_choice.causal_reason = "whether an expert takes a token depends on later ones"  # type: ignore[attr-defined]
expert_choice.balances_load = True  # type: ignore[attr-defined]
expert_choice.renormalize = False  # type: ignore[attr-defined]  # probabilities as they are
