"""`top_k_in_best_groups`: the K best experts of a few groups (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""

import torch
from jaxtyping import Float
from torch import Tensor

from himoe.errors import ConfigError
from himoe.functional.groups import Groups
from himoe.functional.selection.base import Selection, all_selected
from himoe.types import RouterContext


def top_k_in_best_groups(
    scores: Float[Tensor, "T E"],
    context: RouterContext,  # noqa: ARG001
    *,
    groups: Groups,
    k: int,
    keep: int | None = None,
) -> Selection:
    """The k best experts of the `keep` best groups, so that a token reaches few devices (DeepSeek-V3, 2412.19437).

    A group is as good as the sum of its two best scores (its only one, in groups of one expert).

    Args:
        scores: (T, E).
        context: unused.
        groups: equal contiguous groups.
        k: experts per token, in total.
        keep: groups that a token may use; default half of them. The kept ones must hold at least k experts.

    Raises:
        ConfigError: unequal groups, or a `keep` that does not fit.
    """
    keep = max(groups.num_groups // 2, 1) if keep is None else keep
    size = groups.num_experts // groups.num_groups
    if not groups.is_equal:
        raise ConfigError("top_k_in_best_groups: needs equal contiguous groups")
    if not 1 <= keep <= groups.num_groups or not 1 <= k <= keep * size:
        raise ConfigError(
            f"top_k_in_best_groups: keep = {keep} of {groups.num_groups} groups must hold at least k = {k} experts, "
            f"{size} a group; in a preset the option is keep_groups"
        )
    grouped = scores.unflatten(-1, (groups.num_groups, size))
    value = grouped.topk(min(2, size), dim=-1).values.sum(-1)
    kept = torch.zeros_like(value, dtype=torch.bool).scatter(-1, value.topk(keep, dim=-1).indices, True)
    expert_ids = grouped.where(kept[..., None], -torch.inf).flatten(-2).topk(k, dim=-1).indices
    return all_selected(expert_ids)
