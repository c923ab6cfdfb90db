"""Experts without hidden layer, so that a token the others cannot help costs next to nothing (MoE++, arXiv 2410.07348).

Beside them in a `PooledExperts` stand ordinary experts; one router chooses among all. MoE++'s code gives the zero
expert the weight 0 before it renormalises a token's weights; here weights are the router's, so what the zero expert
takes is missing from the others.

None of the three touches a token without kept pairs, and weights and mixing are computed in fp32 whatever the autocast.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from himoe.errors import ConfigError
from himoe.functional.precision import autocast_dtype, without_autocast
from himoe.nn.gate import Gate


class _FreeExperts(nn.Module):
    """E experts without hidden layer."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        if num_experts < 1:
            raise ConfigError(f"{type(self).__name__}: num_experts = {num_experts} must be ≥ 1")
        self.num_experts = num_experts

    def extra_repr(self) -> str:
        """Show the size."""
        return f"num_experts={self.num_experts}"


class ZeroExperts(_FreeExperts):
    """E experts that give 0: the token passes the layer by (MoE++, arXiv 2410.07348).

    Args:
        num_experts: E.
    """

    def forward(
        self,
        x: Float[Tensor, "T D"],
        expert_ids: Int[Tensor, "T K"],  # noqa: ARG002
        weights: Float[Tensor, "T K"],  # noqa: ARG002
        kept: Bool[Tensor, "T K"],  # noqa: ARG002
    ) -> Float[Tensor, "T D"]:
        """Return zeros."""
        return torch.zeros_like(x, dtype=autocast_dtype(x))


class CopyExperts(_FreeExperts):
    """E experts that give x itself: the token skips the layer, weighed (MoE++, 2410.07348; LongCat-Flash, 2509.01322).

    LongCat-Flash has these beside ordinary experts, and neither zeros nor constants.

    Args:
        num_experts: E.
    """

    def forward(
        self,
        x: Float[Tensor, "T D"],
        expert_ids: Int[Tensor, "T K"],  # noqa: ARG002
        weights: Float[Tensor, "T K"],
        kept: Bool[Tensor, "T K"],
    ) -> Float[Tensor, "T D"]:
        """Return x·Σ_k weight over each token's kept pairs."""
        x = _computed(x, kept)
        x = x.to(autocast_dtype(x) or x.dtype)
        return x * weights.where(kept, 0).sum(-1, keepdim=True).to(x.dtype)


class ConstantExperts(_FreeExperts):
    """E experts α₁·x + α₂·v_e, (α₁, α₂) = softmax(W_e x), with a learned vector v_e (MoE++, arXiv 2410.07348).

    Two small products, with the 2·E rows of all W_e, like a gate, and with the E vectors, take the place of E
    networks; they are computed for all T tokens.

    Args:
        num_experts: E.
        dim: D.

    Parameters: `constant.weight` (E, D), normal with standard deviation 1 as MoE++ starts it; `gate.weight` (2·E, D),
    rows 2e and 2e + 1 are W_e, started as a `Gate`. `DecoderLM` draws both anew, as it does all matrices.
    """

    def __init__(self, num_experts: int, dim: int) -> None:
        super().__init__(num_experts)
        if dim < 1:
            raise ConfigError(f"{type(self).__name__}: dim = {dim} must be ≥ 1")
        self.constant = nn.Embedding(num_experts, dim)  # a table by expert, which optimizers know from a hidden matrix
        self.gate = Gate(dim, 2 * num_experts)

    def forward(
        self,
        x: Float[Tensor, "T D"],
        expert_ids: Int[Tensor, "T K"],
        weights: Float[Tensor, "T K"],
        kept: Bool[Tensor, "T K"],
    ) -> Float[Tensor, "T D"]:
        """Return Σ_k weight·(α₁·x + α₂·v_e) over each token's kept pairs."""
        x = _computed(x, kept)
        dtype = autocast_dtype(x) or x.dtype
        with without_autocast(x.device):
            mix = self.gate(x).unflatten(-1, (-1, 2)).softmax(-1)  # (T, E, 2)
            taken = mix.new_zeros(mix.shape[:-1]).scatter_add(-1, expert_ids, weights.where(kept, 0).to(mix.dtype))
            of_x, of_constant = (taken[..., None] * mix).unbind(-1)
            of_x = of_x.sum(-1, keepdim=True).to(dtype)
            return x.to(dtype) * of_x + of_constant.to(dtype) @ self.constant.weight.to(dtype)


def _computed(x: Tensor, kept: Tensor) -> Tensor:
    """Return x with 0 for the tokens that have no kept pair, whatever these hold: padding may be NaN."""
    return x.where(kept.sum(-1, keepdim=True) > 0, 0)
