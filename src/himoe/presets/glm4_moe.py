"""GLM-4.5 (arXiv 2508.06471): DeepSeek-V3's router with all experts in one group.

GLM-4.5 has E = 160, K = 8, D = 5120, F = 1536, one shared expert and weights times 2.5; GLM-4.5-Air E = 128, K = 8,
D = 4096, F = 1408, one shared expert and weights times 1. The shared expert is the layer's, `MoE(shared_expert=…)`.
"""

from himoe.nn import Router
from himoe.presets.deepseek_v3 import deepseek_v3


def glm4_moe(
    dim: int,
    num_experts: int,
    top_k: int = 8,
    *,
    num_groups: int = 1,
    keep_groups: int | None = None,
    rate: float = 1e-3,
    freeze_after: int | None = None,
    sequence_weight: float = 1e-4,
    scaling_factor: float = 2.5,
    renormalize: bool | None = None,
) -> Router:
    """GLM-4.5: sigmoid scores with a selection bias, weights renormalised and scaled, a small loss in each sequence.

    Args:
        dim: D; 5120 in GLM-4.5.
        num_experts: E; 160 there.
        top_k: K; 8 there.
        num_groups: G equal contiguous groups; 1 there.
        keep_groups: groups that a token may use; all by default, so that the groups of a layer change nothing here.
        rate: how far the bias moves per optimizer step; 0.001 there.
        freeze_after: optimizer steps after which the bias stands still; those of the first 15 trillion tokens there.
        sequence_weight: weight of the load-balancing loss within each sequence, f summing to 1; 0.0001 there.
        scaling_factor: on all weights; 2.5 in GLM-4.5, 1 in GLM-4.5-Air.
        renormalize: divide each token's weights by their sum, which GLM-4.5 does; by default only for K > 1.
    """
    return deepseek_v3(
        dim,
        num_experts,
        top_k,
        num_groups=num_groups,
        keep_groups=num_groups if keep_groups is None else keep_groups,
        rate=rate,
        freeze_after=freeze_after,
        sequence_weight=sequence_weight,
        scaling_factor=scaling_factor,
        renormalize=renormalize,
    )
