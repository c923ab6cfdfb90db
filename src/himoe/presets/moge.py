"""MoGE (Pangu Pro, arXiv 2505.21411): k' experts of every group, so every device that holds a group does equal work."""

from collections.abc import Sequence

from himoe.balance import Switch
from himoe.nn import Router
from himoe.presets.grouped import GroupList, grouped_router, resolve_groups


def moge(
    dim: int,
    num_experts: int,
    top_k: int | Sequence[int],
    *,
    num_groups: int | None = None,
    groups: GroupList | None = None,
    alpha: float | None = None,
    renormalize: bool | None = None,
) -> Router:
    """Mixture of grouped experts: one softmax, top-k' inside every group, and the load-balancing loss.

    Args:
        dim: D.
        num_experts: E.
        top_k: K in total, a multiple of the number of groups, or one k' per group.
        num_groups: G equal contiguous groups.
        groups: explicit expert ids of every group, instead of `num_groups`.
        alpha: weight of the load-balancing loss with f summing to 1; default K·0.01, which is the 0.01 that the
            Hi-MoE paper gives its MoGE baseline with f summing to K.
        renormalize: divide each token's weights by their sum; by default for K > 1.
    """
    partition, per_group = resolve_groups(num_experts, top_k, num_groups, groups)
    weight = sum(per_group) * 0.01 if alpha is None else alpha
    return grouped_router(dim, partition, per_group, [Switch(weight=weight)], renormalize=renormalize)
