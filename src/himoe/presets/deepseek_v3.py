"""DeepSeek-V3 (arXiv 2412.19437): sigmoid scores, experts from few groups, a selection bias, and a small loss."""

from functools import partial

from himoe.balance import Balancer, Chain, LossFree, Schedule, SequenceBalance
from himoe.functional.groups import Groups
from himoe.functional.scores import sigmoid
from himoe.functional.selection import top_k_in_best_groups
from himoe.nn import Gate, Router
from himoe.presets.guards import check_guards


def deepseek_v3(
    dim: int,
    num_experts: int,
    top_k: int,
    *,
    num_groups: int = 8,
    keep_groups: int | None = None,
    rate: float = 1e-3,
    freeze_after: int | None = None,
    sequence_weight: float = 1e-4,
    scaling_factor: float = 2.5,
    renormalize: bool | None = None,
) -> Router:
    """Top-k among the best groups by biased sigmoid scores; weights renormalised and scaled; loss-free balancing.

    Args:
        dim: D.
        num_experts: E; 256 in the paper.
        top_k: K; 8 in the paper.
        num_groups: G equal contiguous groups; 8 in the paper.
        keep_groups: groups that a token may use; half of them by default, 4 of 8 in the paper.
        rate: how far the bias moves per optimizer step.
        freeze_after: optimizer steps, at least 1, after which the bias stands still; 14.3 of 14.8 trillion tokens in
            the paper.
        sequence_weight: weight of the load-balancing loss within each sequence; the paper's 0.0001 needs no factor,
            since its f, too, is divided by K.
        scaling_factor: on all weights, after their sum is made 1 where K > 1; 2.5 in the paper.
        renormalize: divide each token's weights by their sum, which the paper does; by default only for K > 1, since at
            K = 1 every weight would be the same and the gate would get no gradient from the task.
    """
    groups = Groups.equal(num_experts, num_groups)
    bias: Balancer = LossFree(num_experts, rate=rate)
    if freeze_after is not None:
        bias = Schedule(bias, "off_after", steps=freeze_after, scales="moves")
    selector = partial(top_k_in_best_groups, groups=groups, k=top_k, keep=keep_groups)
    router = Router(
        Gate(dim, num_experts),
        selector,
        num_experts=num_experts,
        score=sigmoid,
        balancer=Chain(bias, SequenceBalance(weight=sequence_weight)),
        renormalize=top_k > 1 if renormalize is None else renormalize,
        scaling_factor=scaling_factor,
    )
    assert router.top_k == top_k  # routes once, so that groups that do not fit are refused here
    check_guards(router.balancer, top_k=top_k, score=router.score, num_experts=num_experts)
    return router
