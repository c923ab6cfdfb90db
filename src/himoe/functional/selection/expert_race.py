"""`expert_race`: the K·T best of all pairs of token and expert, wherever they lie (Yuan et al., arXiv 2503.16057).

Token choice fixes the experts of a token, expert choice the tokens of an expert; here neither is fixed, only their sum
is: a token that many experts like strongly gets many, another none, and so do experts. K experts a token on average,
T the real tokens of one forward pass. Nothing here balances the load; the paper adds a loss on how alike the routings
of tokens are, which is not here. The paper's weights are the scores as they are.

Scores must compare across tokens, as `sigmoid` ones do: softmax makes every token's sum to 1, so that an undecided
token would win more experts than a decided one.

Not causal in training: whether a pair is among the best depends on all other tokens.

Deviations: the paper's scores are the logits themselves; `sigmoid` orders pairs alike and is never negative. For
inference the paper keeps a running mean of the score of the last pair taken and takes what lies above it, which is
state that a function has not; here every token has its own K best in eval mode. `max_k` bounds the experts of a token:
it then keeps its best, and the pairs that it loses go to nobody else.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from himoe.functional.selection.base import Selection, best_of, check_top_k, places, real_tokens
from himoe.types import RouterContext


def expert_race(scores: Float[Tensor, "T E"], context: RouterContext, *, k: int, max_k: int | None = None) -> Selection:
    """The best pairs of token and expert in the whole batch, K a token on average; not causal (arXiv 2503.16057).

    Args:
        scores: (T, E).
        context: its mask says which tokens are real; padding is never taken. Outside training
            every token has its k best.
        k: mean number of experts of a token.
        max_k: most experts of a token; default all.

    Raises:
        ConfigError: k or max_k out of range.
    """
    return best_of(scores, wanted(scores, context, k=k), places(max_k, scores.shape[-1], "expert_race"))


def wanted(scores: Float[Tensor, "T E"], context: RouterContext, *, k: int) -> Bool[Tensor, "T E"]:
    """Mark the pairs that win."""
    num_tokens, num_experts = scores.shape
    check_top_k(num_experts, k)
    real = torch.ones_like(scores[:, :1], dtype=torch.bool) if context.mask is None else context.mask[:, None]
    marks = torch.zeros_like(scores, dtype=torch.bool)
    if not context.training:
        return marks.scatter(-1, scores.topk(k, dim=-1).indices, True) & real
    best = scores.where(real, -torch.inf).flatten().topk(num_tokens * k).indices
    wins = torch.arange(num_tokens * k, device=scores.device) < k * real_tokens(scores, context)
    return marks.flatten().scatter(0, best, wins).view_as(scores) & real


expert_race.wanted = wanted  # type: ignore[attr-defined]
expert_race.causal = False  # type: ignore[attr-defined]
expert_race.causal_reason = "in training a token's experts depend on how strongly later tokens like theirs"  # type: ignore[attr-defined]
expert_race.renormalize = False  # type: ignore[attr-defined]  # scores as they are
