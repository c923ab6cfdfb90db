"""Switch Transformers as released (arXiv 2101.03961, google/switch-base in transformers): one expert per token.

switch-base-8 … 256 have E = 8 … 256, K = 1, D = 768, F = 3072, ReLU experts and MoE in every second layer.

Unlike `switch`, which has the paper's loss over the batch, the load-balancing loss is taken within each sequence and
averaged, as transformers does; with K = 1 both conventions of f are the same, so the released weights need no factor.
Left out here:
- capacity: a dispatcher's business. The paper has 1.25 in training and 2 in evaluation, `Capacity(1.25)`; transformers
  gives every expert a fixed number of places in each sequence, ours counts the places of the whole batch. A token
  without a place gets nothing from the experts and passes by the residual connection, in both.
- jitter: the gate's input is multiplied by uniform noise in 1 ± 0.01 in training.
"""

from himoe.balance import Balancer, SequenceBalance, ZLoss
from himoe.nn import Router
from himoe.presets.flat import flat_router


def switch_transformers(
    dim: int,
    num_experts: int,
    top_k: int = 1,
    *,
    alpha: float = 1e-3,
    z_loss: float = 1e-3,
    renormalize: bool | None = None,
) -> Router:
    """Switch Transformers as released: one expert, weighed by its probability; loss within each sequence, z-loss.

    Args:
        dim: D; 768 in switch-base.
        num_experts: E; 8 to 256 there.
        top_k: K; 1 there.
        alpha: weight of the load-balancing loss within each sequence, f summing to 1; 0.001 in the released
            configurations, 0.01 in the paper.
        z_loss: weight of the router z-loss; 0.001 in the released configurations, none in the paper.
        renormalize: divide each token's weights by their sum; by default only for K > 1.
    """
    parts: list[Balancer] = [SequenceBalance(weight=alpha), *([ZLoss(weight=z_loss)] if z_loss else [])]
    return flat_router(dim, num_experts, top_k, parts, renormalize=renormalize)
