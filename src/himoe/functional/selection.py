"""Selectors: `scores → (expert_ids, selected)`, plain functions of the scores one token has.

`selected` marks the places that hold a choice; the selectors here always fill all K. Ties go whichever way `topk`
breaks them: do not rely on it, and save the routing wherever it could be computed twice.
"""

import operator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from himoe.errors import ConfigError
from himoe.functional.groups import Groups
from himoe.types import RouterContext

Selection = tuple[Int[Tensor, "T K"], Bool[Tensor, "T K"]]


def check_top_k(num_experts: int, top_k: int) -> None:
    """Raise `ConfigError` unless 1 ≤ K ≤ E."""
    if not 1 <= top_k <= num_experts:
        raise ConfigError(f"top_k = {top_k} must be between 1 and num_experts = {num_experts}")


def top_k(scores: Float[Tensor, "T E"], context: RouterContext, *, k: int) -> Selection:  # noqa: ARG001
    """The k experts of highest score, best first; raises `ConfigError` unless 1 ≤ k ≤ E."""
    check_top_k(scores.shape[-1], k)
    expert_ids = scores.topk(k, dim=-1).indices
    return expert_ids, torch.ones_like(expert_ids, dtype=torch.bool)


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
        ConfigError: not one number per group, or more than the group has experts.
    """
    per_group = (k,) * groups.num_groups if isinstance(k, int) else k
    if len(per_group) != groups.num_groups or any(map(operator.gt, per_group, groups.sizes)):
        raise ConfigError(f"top_k_per_group: k = {k} must give each group at most its size, sizes {groups.sizes}")
    if groups.is_equal and len(set(per_group)) == 1:
        size = groups.num_experts // groups.num_groups
        best = scores.unflatten(-1, (groups.num_groups, size)).topk(per_group[0], dim=-1).indices
        first = torch.arange(0, groups.num_experts, size, device=scores.device)
        expert_ids = (best + first[:, None]).flatten(-2)
    else:
        chosen = []
        for members, k_g in zip(groups.members, per_group, strict=True):
            ids = torch.tensor(members, device=scores.device)
            chosen.append(ids[scores[:, ids].topk(k_g, dim=-1).indices])
        expert_ids = torch.cat(chosen, dim=-1)
    return expert_ids, torch.ones_like(expert_ids, dtype=torch.bool)


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
            f"{size} a group"
        )
    grouped = scores.unflatten(-1, (groups.num_groups, size))
    value = grouped.topk(min(2, size), dim=-1).values.sum(-1)
    kept = torch.zeros_like(value, dtype=torch.bool).scatter(-1, value.topk(keep, dim=-1).indices, True)
    expert_ids = grouped.where(kept[..., None], -torch.inf).flatten(-2).topk(k, dim=-1).indices
    return expert_ids, torch.ones_like(expert_ids, dtype=torch.bool)
