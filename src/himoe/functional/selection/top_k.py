"""`top_k`: the K best experts of every token, the usual choice (Shazeer et al., arXiv 1701.06538)."""

from jaxtyping import Float
from torch import Tensor

from himoe.functional.selection.base import Selection, all_selected, check_top_k
from himoe.types import RouterContext


def top_k(scores: Float[Tensor, "T E"], context: RouterContext, *, k: int) -> Selection:  # noqa: ARG001
    """The k experts of highest score, best first.

    Raises `ConfigError` unless 1 ≤ k ≤ E.
    """
    check_top_k(scores.shape[-1], k)
    return all_selected(scores.topk(k, dim=-1).indices)
