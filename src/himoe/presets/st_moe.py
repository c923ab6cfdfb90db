"""ST-MoE (arXiv 2202.08906): top-2, load-balancing loss and the router z-loss.

ST-MoE-32B has E = 64, K = 2, D = 5120, F = 20480 and MoE in every fourth layer.

Three things that its code (mesh_tensorflow/transformer/moe.py) does besides:
- Capacity, 1.25 in training and 2 in evaluation: a dispatcher's business, `Capacity(1.25)`, which drops nothing in
  evaluation unless asked to.
- `second = "random"`: the second expert is used with probability min(1, w/0.2), w its weight. Weights are normalised
  over the two before that and stay as they are. Here in training only, theirs in evaluation too; the default uses
  every second expert.
- Its load-balancing loss counts first choices alone; ours counts every selected pair. Both have f summing to 1, so the
  weight 0.01 needs no factor.
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from himoe.balance import Balancer, Switch, ZLoss
from himoe.errors import ConfigError
from himoe.functional.noise import uniform_noise
from himoe.functional.selection import Selection
from himoe.functional.selection import top_k as select_top_k
from himoe.nn import Router
from himoe.presets.flat import flat_router
from himoe.types import RouterContext


def st_moe(
    dim: int,
    num_experts: int,
    top_k: int = 2,
    *,
    alpha: float = 0.01,
    z_loss: float = 1e-3,
    second: str = "all",
    second_threshold: float = 0.2,
) -> Router:
    """ST-MoE: the two best experts of a softmax, weights renormalised, load-balancing loss and z-loss.

    Args:
        dim: D; 5120 in ST-MoE-32B.
        num_experts: E; 64 there.
        top_k: K; 2 there.
        alpha: weight of the load-balancing loss, f summing to 1 there and here; 0.01 in the paper.
        z_loss: weight of the router z-loss; 0.001 in the paper.
        second: `all`, or `random`: in training every expert but the first is used with probability
            min(1, weight/second_threshold).
        second_threshold: the weight from which on `random` always uses an expert; 0.2 in the authors' code.
    """
    if second not in ("all", "random") or not second_threshold > 0:
        raise ConfigError(
            f"st_moe: second = {second!r} must be all or random, second_threshold = {second_threshold:g} above 0"
        )
    parts: list[Balancer] = [Switch(weight=alpha), *([ZLoss(weight=z_loss)] if z_loss else [])]
    if second == "all" or top_k == 1:
        return flat_router(dim, num_experts, top_k, parts)
    return flat_router(
        dim,
        num_experts,
        top_k,
        parts,
        score=partial(softmax_over_best, k=top_k),
        selector=partial(top_k_at_random, k=top_k, threshold=second_threshold),
        renormalize=False,  # a first expert that stays alone keeps its share
    )


def softmax_over_best(logits: Float[Tensor, "T E"], *, k: int) -> Float[Tensor, "T E"]:
    """Softmax over the k largest logits, continued to the others: the k largest scores of a row sum to 1."""
    return (logits - logits.topk(k, dim=-1).values.logsumexp(-1, keepdim=True)).exp()


def top_k_at_random(scores: Float[Tensor, "T E"], context: RouterContext, *, k: int, threshold: float) -> Selection:
    """The best expert, and in training each of the next k − 1 with probability min(1, score/threshold)."""
    expert_ids, selected = select_top_k(scores, context, k=k)
    if context.training:
        chosen = scores.gather(-1, expert_ids)
        first = torch.arange(k, device=scores.device) == 0
        selected = first | (uniform_noise(chosen, context.mask) * threshold < chosen)
    return expert_ids, selected


top_k_at_random.random = True  # type: ignore[attr-defined]
