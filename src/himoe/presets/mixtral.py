"""Mixtral (arXiv 2401.04088): the weights are one softmax over the K selected logits.

Mixtral 8x7B has E = 8, K = 2, D = 4096, F = 14336 and MoE in all of its 32 layers, without a shared expert.

A softmax over all experts, divided by the sum of the selected, is the softmax over the selected; it is what is done
here. The paper does not tell its load-balancing loss; the released configuration names 0.02, which transformers uses
with f summing to K: ours is K·0.02 for one layer. (With several layers transformers puts the tokens of all layers
into one mean before it multiplies; ours is computed for each layer and then summed.)
"""

from himoe.nn import Router
from himoe.presets.flat import flat_router, load_balance_and_z_loss


def mixtral(
    dim: int,
    num_experts: int,
    top_k: int = 2,
    *,
    alpha: float | None = None,
    z_loss: float = 0.0,
    renormalize: bool | None = None,
) -> Router:
    """Mixtral: the K best experts, weighed by a softmax over their logits alone, and the load-balancing loss.

    Args:
        dim: D; 4096 in Mixtral 8x7B.
        num_experts: E; 8 there.
        top_k: K; 2 there.
        alpha: weight of the load-balancing loss, f summing to 1; default K·0.02, the released 0.02 with f summing to K.
        z_loss: weight of the router z-loss; none in Mixtral.
        renormalize: make the weights a softmax over the selected, which Mixtral does; by default only for K > 1, since
            at K = 1 every weight would be 1 and the gate would get no gradient from the task.
    """
    parts = load_balance_and_z_loss(top_k, alpha, 0.02, z_loss)
    return flat_router(dim, num_experts, top_k, parts, renormalize=renormalize)
