"""OLMoE (arXiv 2409.02060): softmax over all experts, weights as they are, load-balancing loss and z-loss.

OLMoE-1B-7B has E = 64, K = 8, D = 2048, F = 1024 and MoE in all of its 16 layers, without a shared expert and without
dropped tokens: `Dropless`.

Its load-balancing weight of 0.01 stands for different things in two places. Where f sums to K, as in transformers,
ours is K·0.01 for one layer; that is the default here. MegaBlocks, the library it was trained with, divides by K and
takes the mean over layers: the same in our convention is 0.01/layers, `alpha = 0.01 / 16`.
"""

from himoe.nn import Router
from himoe.presets.flat import flat_router, load_balance_and_z_loss


def olmoe(
    dim: int,
    num_experts: int,
    top_k: int = 8,
    *,
    alpha: float | None = None,
    z_loss: float = 1e-3,
    renormalize: bool = False,
) -> Router:
    """OLMoE: softmax over all, the K best, weights not renormalised, load-balancing loss and z-loss.

    Args:
        dim: D; 2048 in OLMoE-1B-7B.
        num_experts: E; 64 there.
        top_k: K; 8 there.
        alpha: weight of the load-balancing loss, f summing to 1; default K·0.01, the published 0.01 with f summing to
            K. `alpha = 0.01 / number of layers` is what its training library makes of the same number.
        z_loss: weight of the router z-loss; 0.001 in the paper.
        renormalize: divide each token's weights by their sum; not in OLMoE.
    """
    parts = load_balance_and_z_loss(top_k, alpha, 0.01, z_loss)
    return flat_router(dim, num_experts, top_k, parts, renormalize=renormalize)
