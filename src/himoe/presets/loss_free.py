"""Loss-Free Balancing (arXiv 2408.15664): sigmoid scores, a bias on the choice, no auxiliary loss."""

from functools import partial

from himoe.balance import LossFree
from himoe.functional.scores import sigmoid
from himoe.functional.selection import check_top_k
from himoe.functional.selection import top_k as select_top_k
from himoe.nn import Gate, Router
from himoe.presets.guards import check_guards


def loss_free(
    dim: int,
    num_experts: int,
    top_k: int,
    *,
    rate: float = 1e-3,
    update: str = "sign",
    centred: bool = False,
    multiplicative: bool = False,
    renormalize: bool | None = None,
) -> Router:
    """Select the K best of sigmoid scores plus a bias that follows the load; weights from the scores alone.

    Args:
        dim: D.
        num_experts: E.
        top_k: K.
        rate: how far the bias moves per optimizer step.
        update: `sign` (the paper), `proportional` or `rms`.
        centred: keep the sum of the biases where it is.
        multiplicative: rank by score times bias.
        renormalize: divide each token's weights by their sum; by default only for K > 1, since at K = 1 every weight
            would be 1 and the gate would get no gradient.
    """
    check_top_k(num_experts, top_k)
    router = Router(
        Gate(dim, num_experts),
        partial(select_top_k, k=top_k),
        num_experts=num_experts,
        score=sigmoid,
        balancer=LossFree(num_experts, rate=rate, update=update, centred=centred, multiplicative=multiplicative),
        renormalize=top_k > 1 if renormalize is None else renormalize,
    )
    check_guards(router.balancer, top_k=top_k, score=router.score, num_experts=num_experts)
    return router
