"""What the presets with one top-k' per group share: who is in which group, and how many each group gives."""

from collections.abc import Sequence
from functools import partial

from himoe.balance import Balancer, Chain
from himoe.errors import ConfigError
from himoe.functional.groups import Groups
from himoe.functional.selection import top_k_per_group
from himoe.nn import Gate, Router

GroupList = Sequence[Sequence[int]]


def resolve_groups(
    num_experts: int, top_k: int | Sequence[int], num_groups: int | None, groups: GroupList | None
) -> tuple[Groups, tuple[int, ...]]:
    """Return the groups and k' of each.

    Args:
        num_experts: E.
        top_k: K in total, split equally over the groups, or one k' per group.
        num_groups: G equal contiguous groups; or
        groups: an explicit list of expert ids per group.

    Raises:
        ConfigError: numbers that do not divide, or a k' larger than its group.
    """
    if (num_groups is None) == (groups is None):
        raise ConfigError("give num_groups, or an explicit list of groups: one of the two")
    partition = Groups.of(num_groups if groups is None else [list(g) for g in groups], num_experts)  # type: ignore[arg-type]
    if isinstance(top_k, int):
        if top_k % partition.num_groups or top_k < 1:
            raise ConfigError(
                f"top_k = {top_k} must be a positive multiple of num_groups = {partition.num_groups}, "
                "or a list with one number per group"
            )
        per_group = (top_k // partition.num_groups,) * partition.num_groups
    else:
        per_group = tuple(top_k)
    if len(per_group) != partition.num_groups or any(
        not 1 <= k <= s for k, s in zip(per_group, partition.sizes, strict=False)
    ):
        raise ConfigError(
            f"top_k per group {per_group}: must be between 1 and the group's size, sizes {partition.sizes}"
        )
    return partition, per_group


def grouped_router(
    dim: int,
    partition: Groups,
    per_group: tuple[int, ...],
    balancers: Sequence[Balancer],
    *,
    renormalize: bool | None = None,
    expert_scale: bool = False,
) -> Router:
    """Return a softmax router that takes k' experts of every group.

    At K = 1 a renormalised weight is 1 and the gate learns nothing from the task, so None renormalises for K > 1 only.
    """
    return Router(
        Gate(dim, partition.num_experts),
        partial(top_k_per_group, groups=partition, k=per_group),
        num_experts=partition.num_experts,
        balancer=Chain(*balancers),
        renormalize=sum(per_group) > 1 if renormalize is None else renormalize,
        expert_scale=expert_scale,
    )
