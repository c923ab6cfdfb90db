"""Experts of several kinds or sizes as the experts of one layer.

One router over all pools, or one per pool (Slicing and Dicing, arXiv 2605.11689): the second is selection per group,
with the pools as groups and k' experts of each.
"""

import itertools

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from himoe.errors import ConfigError


class PooledExperts(nn.Module):
    """Several pools of experts, numbered one after another: expert 0 of the second follows the last of the first.

    Args:
        *pools: experts modules, such as `SwiGLUExperts` of different sizes, or `ZeroExperts`.

    In each pool the pairs of the others are not kept, so every pair is computed once. Shapes do not depend on the data:
    each pool makes room for the T·K pairs, whatever its share of them.

    Raises:
        ConfigError: no pool, or one that does not say its `num_experts`.

    >>> import torch
    >>> from himoe import SwiGLUExperts
    >>> from himoe.nn import ZeroExperts
    >>> experts = PooledExperts(SwiGLUExperts(4, 16, 32), SwiGLUExperts(8, 16, 16), ZeroExperts(2))
    >>> experts.num_experts, experts.sizes
    (14, (4, 8, 2))
    """

    def __init__(self, *pools: nn.Module) -> None:
        super().__init__()
        if not pools:
            raise ConfigError("pooled experts: give at least one pool")
        for index, pool in enumerate(pools):
            if not isinstance(getattr(pool, "num_experts", None), int):
                raise ConfigError(
                    f"pooled experts: pool {index}, {type(pool).__name__}, must have num_experts, their number"
                )
        self.pools = nn.ModuleList(pools)
        self.sizes: tuple[int, ...] = tuple(pool.num_experts for pool in pools)  # type: ignore[misc]
        self.num_experts = sum(self.sizes)

    def forward(
        self,
        x: Float[Tensor, "T D"],
        expert_ids: Int[Tensor, "T K"],
        weights: Float[Tensor, "T K"],
        kept: Bool[Tensor, "T K"],
    ) -> Float[Tensor, "T D"]:
        """Return Σ_k weight·expert(x) over each token's kept pairs."""
        y: Tensor | None = None
        ends = itertools.accumulate(self.sizes, initial=0)
        for pool, (first, end) in zip(self.pools, itertools.pairwise(ends), strict=True):
            inside = (expert_ids >= first) & (expert_ids < end)
            out = pool(x, (expert_ids - first).clamp(0, end - first - 1), weights, kept & inside)
            y = out if y is None else y + out
        assert y is not None
        return y
