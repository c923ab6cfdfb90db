"""`threshold`: every expert whose score is above a limit (ReMoE, arXiv 2412.14711, with `relu` scores and limit 0).

ReMoE is exact with `relu` scores, weights that are not renormalised and `max_k` = E, the default: an expert is used
where its logit is positive, so a layer starts nearly dense, with about half of them where logits are symmetric around
0, and a controller of the scores' L1 norm makes it sparse. A balancer with a threshold per expert aims at the same
selector by shifting the scores.

A token may get no expert at all: its weights are 0 and the routed part of the layer adds nothing to it.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from himoe.functional.selection.base import Selection, best_of, places
from himoe.types import RouterContext


def threshold(
    scores: Float[Tensor, "T E"],
    context: RouterContext,
    *,
    threshold: float = 0.0,
    max_k: int | None = None,
) -> Selection:
    """Every expert with a score above a limit, none where there is none (ReMoE, arXiv 2412.14711).

    Args:
        scores: (T, E).
        context: unused.
        threshold: the limit; a score equal to it is not above it.
        max_k: most experts of a token, the best of those above the limit; default all.

    Raises:
        ConfigError: max_k out of range.
    """
    above = wanted(scores, context, threshold=threshold)
    return best_of(scores, above, places(max_k, scores.shape[-1], "threshold"))


def wanted(scores: Float[Tensor, "T E"], context: RouterContext, *, threshold: float = 0.0) -> Bool[Tensor, "T E"]:  # noqa: ARG001
    """Mark the experts above the limit."""
    return scores > threshold


threshold.wanted = wanted  # type: ignore[attr-defined]
threshold.toy_options = {"threshold": 0.1}  # type: ignore[attr-defined]
