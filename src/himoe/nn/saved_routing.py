"""`himoe::saved_routing`: hands a choice of experts on unchanged, by an operator that recomputation knows by name.

Activation checkpointing runs a layer's forward pass again during backward, and the last bits of its logits may differ
then: kernels may add in another order, and experts that were nearly tied would change places. So what the selector
chose passes through this operator, and a checkpoint that saves the operator's result (`models/recompute.py`) computes
with the experts of the first pass, whatever a second selection says.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@torch.library.custom_op("himoe::saved_routing", mutates_args=())
def _saved_routing(expert_ids: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
    return expert_ids.clone(), selected.clone()  # an operator must not return what it was given


@_saved_routing.register_fake
def _(expert_ids: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(expert_ids), torch.empty_like(selected)


def saved_routing(
    expert_ids: Int[Tensor, "T K"], selected: Bool[Tensor, "T K"]
) -> tuple[Int[Tensor, "T K"], Bool[Tensor, "T K"]]:
    """Return both as they are; under a checkpoint that saves this, as they were in the first forward pass."""
    return _saved_routing(expert_ids, selected)
