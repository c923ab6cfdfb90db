"""Qwen3's mixture of experts (arXiv 2505.09388): renormalised top-k and a load-balancing loss over the global batch.

Qwen3-30B-A3B has E = 128, K = 8, D = 2048, F = 768 and MoE in all of its 48 layers, without a shared expert.

The loss is that of arXiv 2501.11873: counts of the whole global batch, so that a single text need not use all experts.
The released configuration names 0.001, which transformers uses with f summing to K: ours is K·0.001 for one layer.
"""

from himoe.balance import GlobalBatch
from himoe.nn import Router
from himoe.presets.flat import flat_router


def qwen3_moe(
    dim: int,
    num_experts: int,
    top_k: int = 8,
    *,
    alpha: float | None = None,
    renormalize: bool | None = None,
) -> Router:
    """Qwen3: softmax over all, the K best, weights renormalised, load-balancing loss over the global batch.

    Args:
        dim: D; 2048 in Qwen3-30B-A3B.
        num_experts: E; 128 there.
        top_k: K; 8 there.
        alpha: weight of the load-balancing loss, f summing to 1; default K·0.001, the released 0.001 with f summing
            to K.
        renormalize: divide each token's weights by their sum, which Qwen3 does; by default only for K > 1, since at
            K = 1 every weight would be 1 and the gate would get no gradient from the task.
    """
    loss = GlobalBatch(weight=0.001 * top_k if alpha is None else alpha)
    return flat_router(dim, num_experts, top_k, [loss], renormalize=renormalize)
