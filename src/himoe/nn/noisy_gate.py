"""The noisy gate of Shazeer et al. (arXiv 1701.06538, eq. 4): normal noise on the logits, as strong as the token says.

    H(x) = x Wᵀ + ε·σ(x)      σ(x) = softplus(x W_noiseᵀ) + noise_floor      ε normal, in training only

The gate gives both parts; the router draws ε, adds it before anything else looks at the logits, and hands noise and σ
on to the balancers, such as the loss `load`, which asks how likely an expert was to be chosen. ε depends on a token's
place among the real tokens, not on padding.

Both matrices start at 0, as in the paper: no signal and some noise, so that load starts even. A model that draws all
its matrices anew, as DecoderLM does, draws these too, small.

Deviation: `noise_floor`, which the authors' code has and the paper has not. It keeps the noise from dying out; 0 is the
paper's formula.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from himoe.errors import ConfigError
from himoe.functional.precision import accumulation_dtype, without_autocast


class NoisyGate(nn.Module):
    """A linear gate with learned normal noise in training (Shazeer et al., arXiv 1701.06538).

    Args:
        dim: D.
        num_experts: E.
        noise_floor: smallest standard deviation of the noise, in logits, ≥ 0.

    Parameters: `weight` and `noise_weight`, both (E, D).
    """

    def __init__(self, dim: int, num_experts: int, *, noise_floor: float = 1e-2) -> None:
        super().__init__()
        if not 0 <= noise_floor < float("inf"):
            raise ConfigError(f"noisy gate: noise_floor = {noise_floor} must be ≥ 0 and finite")
        self.noise_floor = noise_floor
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.noise_weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set both matrices to 0."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.noise_weight)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """Return the logits without noise, at least fp32."""
        return _linear(x, self.weight)

    def noise_std(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """Return σ(x), at least fp32."""
        return F.softplus(_linear(x, self.noise_weight)) + self.noise_floor


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    with without_autocast(x.device):
        return F.linear(x.to(dtype), weight.to(dtype))
