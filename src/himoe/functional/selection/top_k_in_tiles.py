"""`top_k_in_tiles`: top K, then every expert's token count rounded to whole tiles of the kernel (arXiv 2512.14080).

A grouped product computes tiles of rows, and an expert's last tile is mostly empty where experts are many: SonicMoE's
token rounding drops an expert's tokens of smallest score, or adds those of largest score that had not chosen it,
whichever is nearer. In eval mode nothing is rounded, so that a token's experts do not depend on what else is read.

Not causal in training: whether an expert takes a token depends on how many others chose it. What it does to the loss
has not been measured here.

Deviations: an expert with any token never loses all of them, it gets a tile; a batch with fewer real tokens than a tile
is left as it is. `max_k` bounds the experts of a token: it then keeps its best, and counts fall short of whole tiles.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from himoe.functional.selection.base import Selection, best_of, check_top_k, places, real_tokens, refuse
from himoe.types import RouterContext


def top_k_in_tiles(
    scores: Float[Tensor, "T E"],
    context: RouterContext,
    *,
    k: int,
    tile: int = 128,
    max_k: int | None = None,
) -> Selection:
    """The k best experts of a token, rounded in training to whole tiles per expert; not causal (arXiv 2512.14080).

    Args:
        scores: (T, E).
        context: its mask says which tokens are real; padding is never taken. Outside training nothing is rounded.
        k: experts of a token before rounding.
        tile: rows of the kernel's tile.
        max_k: most experts of a token; default all. Memory is taken for T·max_k pairs.

    Raises:
        ConfigError: k, tile or max_k out of range.
    """
    taken = wanted(scores, context, k=k, tile=tile)
    return best_of(scores, taken, places(max_k, scores.shape[-1], "top_k_in_tiles"))


def wanted(scores: Float[Tensor, "T E"], context: RouterContext, *, k: int, tile: int = 128) -> Bool[Tensor, "T E"]:
    """Mark the tokens of every expert after rounding, whatever their number per token."""
    num_tokens, num_experts = scores.shape
    check_top_k(num_experts, k)
    if tile < 1:
        refuse("top_k_in_tiles", f"tile = {tile} must be at least 1")
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(k, dim=-1).indices, True)
    real = torch.ones_like(chosen) if context.mask is None else context.mask[:, None].expand_as(chosen)
    chosen = chosen & real
    if not context.training:
        return chosen
    tokens, counts = real_tokens(scores, context), chosen.sum(0)
    rounded = ((counts + tile // 2) // tile * tile).clamp(min=tile).where(counts > 0, 0)
    count = torch.minimum(rounded, tokens).where(tokens >= tile, counts)
    # Sorted twice: by score, then, keeping that order, the chosen before the others and padding last.
    by_score = scores.argsort(dim=0, descending=True, stable=True)
    turn = torch.where(real, 1 - chosen.long(), 2).gather(0, by_score)
    order = by_score.gather(0, turn.argsort(dim=0, stable=True))
    is_taken = torch.arange(num_tokens, device=scores.device)[:, None] < count
    return torch.zeros_like(chosen).scatter(0, order, is_taken)


top_k_in_tiles.wanted = wanted  # type: ignore[attr-defined]
top_k_in_tiles.causal = False  # type: ignore[attr-defined]
top_k_in_tiles.causal_reason = "in training later tokens move an expert's count to the next tile"  # type: ignore[attr-defined]
top_k_in_tiles.toy_options = {"tile": 4}  # type: ignore[attr-defined]
