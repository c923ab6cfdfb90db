"""`top_p`: as many experts as it takes to hold a share p of the scores (Huang et al., arXiv 2403.07652, eq. 4).

A token whose scores are spread gets many experts, one whose scores are sharp gets few. Nothing here keeps the number
small: the paper adds a loss on the entropy of the scores, and `max_k` bounds it. The paper weighs the chosen experts
by their scores as they are; with `renormalize` they are divided by their sum.

Deviations: the share is of the row's sum, so that scores which do not sum to 1 can be used; a negative score, as a bias
can make it, counts as 0.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from himoe.functional.selection.base import Selection, places, refuse
from himoe.types import RouterContext


def top_p(
    scores: Float[Tensor, "T E"],
    context: RouterContext,  # noqa: ARG001
    *,
    p: float = 0.4,
    max_k: int | None = None,
) -> Selection:
    """The fewest best experts that hold a share p of the scores, at least one (arXiv 2403.07652).

    Args:
        scores: (T, E).
        context: unused.
        p: share of the row's sum, above 0 and at most 1; the paper trains with 0.4.
        max_k: most experts of a token; default all.

    Raises:
        ConfigError: p or max_k out of range.
    """
    max_k = places(max_k, scores.shape[-1], "top_p")
    _check(p)
    best = scores.topk(max_k, dim=-1)
    return best.indices, _needed(best.values, scores, p)


def wanted(scores: Float[Tensor, "T E"], context: RouterContext, *, p: float = 0.4) -> Bool[Tensor, "T E"]:  # noqa: ARG001
    """Mark every token's smallest set, whatever its size."""
    _check(p)
    ranked = scores.sort(dim=-1, descending=True)
    needed = _needed(ranked.values, scores, p)
    return torch.zeros_like(needed).scatter(-1, ranked.indices, needed)


def _check(p: float) -> None:
    if not 0 < p <= 1:
        refuse("top_p", f"p = {p} must be above 0 and at most 1")


def _needed(best: Float[Tensor, "T K"], scores: Float[Tensor, "T E"], p: float) -> Bool[Tensor, "T K"]:
    """Mark the experts, of the best in order, before which less than p is held; the first whatever it holds."""
    held = best.clamp(min=0).cumsum(-1)
    before = torch.cat([torch.zeros_like(held[:, :1]), held[:, :-1]], dim=-1)
    first = torch.arange(best.shape[-1], device=best.device) == 0
    return (before < p * scores.clamp(min=0).sum(-1, keepdim=True)) | first


top_p.wanted = wanted  # type: ignore[attr-defined]
top_p.renormalize = False  # type: ignore[attr-defined]  # probabilities as they are
top_p.toy_options = {"p": 0.7, "max_k": 5}  # type: ignore[attr-defined]
