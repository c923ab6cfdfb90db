"""Experts of several kinds or sizes as the experts of one layer, and a network with a gate before it."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from himoe.errors import ConfigError


class PooledExperts(nn.Module):
    """Several pools of experts, numbered one after another: expert 0 of the second follows the last of the first.

    Args:
        *pools: experts modules, such as `SwiGLUExperts` of different sizes, or `ZeroExperts`.

    Pairs of other pools are not kept in a pool, so each pair is computed once.
    """

    def __init__(self, *pools: nn.Module) -> None:
        super().__init__()
        if not pools:
            raise ConfigError("pooled experts: give at least one pool")
        self.pools = nn.ModuleList(pools)
        self.sizes = tuple(int(pool.num_experts) for pool in pools)  # type: ignore[arg-type]
        self.num_experts = sum(self.sizes)

    def forward(
        self,
        x: Float[Tensor, "T D"],
        expert_ids: Int[Tensor, "T K"],
        weights: Float[Tensor, "T K"],
        kept: Bool[Tensor, "T K"],
    ) -> Float[Tensor, "T D"]:
        """Return Σ_k weight·expert(x) over each token's kept pairs."""
        y, first = torch.zeros_like(x), 0
        for pool, size in zip(self.pools, self.sizes, strict=True):
            local = expert_ids - first
            inside = (local >= 0) & (local < size)
            y = y + pool(x, local.clamp(0, size - 1), weights, kept & inside)
            first += size
        return y


class GatedNetwork(nn.Module):
    """A network weighed token by token, sigmoid(w·x)·network(x), as Qwen's shared expert is.

    Args:
        network: (…, D) → (…, D).
        dim: D.
    """

    def __init__(self, network: nn.Module, dim: int) -> None:
        super().__init__()
        self.network = network
        self.gate = nn.Linear(dim, 1, bias=False)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Return the weighed output."""
        return self.gate(x).sigmoid() * self.network(x)
