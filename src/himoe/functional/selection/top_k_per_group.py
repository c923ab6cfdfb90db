"""`top_k_per_group`: the K/G best experts of every group (MoGE, arXiv 2505.21411; Hi-MoE, arXiv 2605.08292).

Groups may be unequal, each with a number of its own; equal contiguous groups with one number are the fast path.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from himoe.errors import ConfigError
from himoe.functional.constants import numbers_on
from himoe.functional.groups import Groups
from himoe.functional.selection.base import Selection, all_selected
from himoe.types import RouterContext


def top_k_per_group(
    scores: Float[Tensor, "T E"],
    context: RouterContext,  # noqa: ARG001
    *,
    groups: Groups,
    k: int | tuple[int, ...],
) -> Selection:
    """The k' best experts inside every group, group after group, best first in each (MoGE, arXiv 2505.21411).

    Every group gets exactly T·k' pairs, hence so does every device that holds a group.

    Args:
        scores: (T, E).
        context: unused.
        groups: the partition of the E experts.
        k: k' for all groups, or one number per group. K is their sum.

    Raises:
        ConfigError: not one number per group, or one below 1 or above the group's size.
    """
    per_group = (k,) * groups.num_groups if isinstance(k, int) else k
    if len(per_group) != groups.num_groups or not all(
        1 <= k_g <= size for k_g, size in zip(per_group, groups.sizes, strict=False)
    ):
        raise ConfigError(
            f"top_k_per_group: k = {k} must give each group a number between 1 and its size, sizes {groups.sizes}"
        )
    if groups.is_equal and len(set(per_group)) == 1:
        size = groups.num_experts // groups.num_groups
        best = scores.unflatten(-1, (groups.num_groups, size)).topk(per_group[0], dim=-1).indices
        first = torch.arange(0, groups.num_experts, size, device=scores.device)
        expert_ids = (best + first[:, None]).flatten(-2)
    else:
        chosen = []
        for members, k_g in zip(groups.members, per_group, strict=True):
            ids = numbers_on(scores.device, members)
            chosen.append(ids[scores[:, ids].topk(k_g, dim=-1).indices])
        expert_ids = torch.cat(chosen, dim=-1)
    return all_selected(expert_ids)
