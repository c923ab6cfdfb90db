"""`sinkhorn`: in training the K best of a matrix whose experts are balanced (S-BASE, Clark et al., arXiv 2202.01169).

The scores are the kernel: softmax scores are exp(logits) up to a factor per token, and such a factor changes nothing.
It is brought to equal sums per expert and per token by a fixed number of alternating normalisations, in logarithms:

    v_e = −log Σ_t exp(log s_te + u_t)      u_t = −log Σ_e exp(log s_te + v_e)      u starts at 0, v is last

Padding is left out of the sums over tokens. The choice of a token is the K best of log s + v: u moves all its experts
alike. In eval mode it is the plain K best of s, as in the paper, so what is trained is not quite what is used.

It balances the choice of training alone. Nothing here evens out the scores themselves, so in eval the load is what the
scores make it: on the toy of `himoe.testing.behaviour` MaxVio was 0.24 in training, 1.28 in eval, 2.16 without any
balancing. Where experts share devices when the model is used, add a balancer.

Not causal in training: v depends on every token of the batch. It balances the matrix, hence the K best about, not
exactly; equal tokens choose alike and cannot be balanced. A score of 0 or less counts as the smallest positive number.

Deviations: the paper routes to one expert; iterations are fixed, so that nothing depends on the data.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from himoe.functional.selection.base import Selection, all_selected, check_top_k, refuse
from himoe.types import RouterContext


def sinkhorn(scores: Float[Tensor, "T E"], context: RouterContext, *, k: int, iterations: int = 10) -> Selection:
    """The k best of scores balanced in training alone; not causal there, top_k in eval (S-BASE, arXiv 2202.01169).

    Args:
        scores: (T, E), positive.
        context: its mask says which tokens are real, its mode which rule holds.
        k: experts per token.
        iterations: normalisations of the experts; between two of them the tokens are normalised.

    Raises:
        ConfigError: k or iterations out of range.
    """
    check_top_k(scores.shape[-1], k)
    if iterations < 1:
        refuse("sinkhorn", f"iterations = {iterations} must be at least 1")
    if context.training:
        scores = _balanced(scores, context, iterations)
    return all_selected(scores.topk(k, dim=-1).indices)


def _balanced(scores: Tensor, context: RouterContext, iterations: int) -> Tensor:
    """Return log s + v."""
    log_scores = scores.clamp(min=torch.finfo(scores.dtype).tiny).log()
    counted = log_scores if context.mask is None else log_scores.where(context.mask[:, None], -torch.inf)
    v = _minus_log_sum(counted, 0)
    for _ in range(iterations - 1):
        u = _minus_log_sum(log_scores + v, 1)
        v = _minus_log_sum(counted + u, 0)
    return log_scores + v


def _minus_log_sum(values: Tensor, dim: int) -> Tensor:
    total = values.logsumexp(dim, keepdim=True)
    return -total.where(total.isfinite(), 0)  # without a real token there is nothing to balance


sinkhorn.causal = False  # type: ignore[attr-defined]
sinkhorn.causal_reason = "in training, scores are balanced over all tokens of the batch"  # type: ignore[attr-defined]
sinkhorn.balances_load = True  # type: ignore[attr-defined]  # the choice of training, see above
