"""Score functions: `logits → scores`, what the combine weights are made of.

Scores are not negative. `relu` alone can be exactly 0; whoever takes a logarithm of scores clamps them first.

A function whose authors do, or do not, divide a token's weights by their sum says so in its attribute `renormalize`,
which a configuration follows unless it says otherwise.
"""

import operator

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from himoe.errors import ConfigError
from himoe.functional.constants import numbers_on
from himoe.functional.groups import Groups


def softmax(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """One softmax over all E experts; rows sum to 1."""
    return logits.softmax(-1)


def sigmoid(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """An independent sigmoid per expert (DeepSeek-V3, Loss-Free Balancing); rows do not sum to 1."""
    return logits.sigmoid()


def sqrt_softplus(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """√log(1 + exp(logit)) per expert: a sigmoid's tail below, no upper limit; rows do not sum to 1.

    About exp(logit/2) for very negative logits and √logit for large ones. Where softplus underflows, far below any
    score that counts, the gradient is 0 instead of 0/0.
    """
    return F.softplus(logits).clamp(min=torch.finfo(logits.dtype).tiny).sqrt()


def relu(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """max(logit, 0) per expert, for the selector `threshold` (ReMoE, arXiv 2412.14711); a row can be all 0.

    A bias added to the choice can lift a score of 0 over the threshold: that expert is computed, and weighs 0.
    """
    return logits.relu()


def softmax_over_selected(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """exp(logit − largest); renormalised, exactly the softmax over the selected logits (Mixtral, arXiv 2401.04088).

    Without `renormalize` it is not: the best expert would always weigh 1.
    """
    return (logits - logits.amax(-1, keepdim=True)).exp()


def softmax_per_group(
    logits: Float[Tensor, "T E"], *, groups: Groups, k: int | tuple[int, ...]
) -> Float[Tensor, "T E"]:
    """A softmax inside every group times k_g/K: one gate as a router per pool (Slicing and Dicing, arXiv 2605.11689).

    With top_k_per_group and weights that are not renormalised the layer gives Σ_g k_g·o_g/K, o_g being what a layer
    of group g alone would give with softmax scores. Rows sum to 1.

    Args:
        logits: (T, E).
        groups: the partition of the E experts.
        k: experts that a token takes from each group, one number or one per group; K is their sum.

    Raises:
        ConfigError: not one number per group, or one below 1 or above the group's size.
    """
    per_group = (k,) * groups.num_groups if isinstance(k, int) else tuple(k)
    if len(per_group) != groups.num_groups or min(per_group) < 1 or any(map(operator.gt, per_group, groups.sizes)):
        raise ConfigError(f"softmax_per_group: k = {k} must give each group 1 to its size, sizes {groups.sizes}")
    share = numbers_on(logits.device, per_group, logits.dtype) / sum(per_group)
    return groups.shares(logits) * groups.expand(share)


relu.renormalize = False  # type: ignore[attr-defined]
softmax_over_selected.renormalize = True  # type: ignore[attr-defined]
softmax_per_group.renormalize = False  # type: ignore[attr-defined]
