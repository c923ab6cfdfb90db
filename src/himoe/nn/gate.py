"""The gate: tokens to logits, computed in fp32 whatever the autocast."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from himoe.functional.precision import accumulation_dtype, without_autocast


class Gate(nn.Module):
    """A linear map without bias, logits = x Wᵀ.

    Any module `x (T, D) → logits (T, E)` can stand in its place.

    Args:
        dim: D.
        num_experts: E.

    Initialised normal with standard deviation 1/√D, so that logits of unit-variance tokens have unit variance.
    """

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.weight.shape[1]))

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """Return the logits, at least fp32."""
        dtype = accumulation_dtype(x.dtype)
        with without_autocast(x.device):
            return F.linear(x.to(dtype), self.weight.to(dtype))
