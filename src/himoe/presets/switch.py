"""Switch Transformers (arXiv 2101.03961) and its top-K generalisation."""

from functools import partial

from himoe.balance import Chain, Switch, ZLoss
from himoe.functional.selection import check_top_k
from himoe.functional.selection import top_k as select_top_k
from himoe.nn import Gate, Router


def switch(
    dim: int,
    num_experts: int,
    top_k: int = 1,
    *,
    alpha: float = 0.01,
    z_loss: float = 0.0,
    renormalize: bool | None = None,
) -> Router:
    """Softmax, the K best experts, and the load-balancing loss.

    Args:
        dim: D.
        num_experts: E.
        top_k: K; 1 in the paper.
        alpha: weight of the load-balancing loss, f summing to 1; 0.01 in the paper, where K = 1 makes both conventions
            the same.
        z_loss: weight of the router z-loss.
        renormalize: divide each token's weights by their sum; by default only for K > 1, since at K = 1 every weight
            would be 1 and the gate would get no gradient from the task.
    """
    check_top_k(num_experts, top_k)
    parts = [Switch(weight=alpha)] + ([ZLoss(weight=z_loss)] if z_loss else [])
    return Router(
        Gate(dim, num_experts),
        partial(select_top_k, k=top_k),
        num_experts=num_experts,
        balancer=Chain(*parts),
        renormalize=top_k > 1 if renormalize is None else renormalize,
    )
