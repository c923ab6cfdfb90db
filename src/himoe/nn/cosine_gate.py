"""The cosine gate of X-MoE (arXiv 2204.09179, section 3): directions on a small sphere, so that no norm decides.

    logit_e = cos(P x, w_e) / τ

P projects the token to `proj_dim` dimensions, both sides are brought to length 1, and the temperature τ is learned.

Choices of ours: τ = min_temperature + exp(θ), which cannot pass its minimum and always has a gradient; it starts at
`temperature`. Length 1 is v/√(|v|² + 10⁻¹²), so that a vector of zeros has a gradient too. θ is a vector of one number,
hence never decayed by `himoe train`.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from himoe.errors import ConfigError
from himoe.functional.precision import accumulation_dtype, without_autocast


class CosineGate(nn.Module):
    """The cosine of token and expert in a small space, over a learned temperature (X-MoE, arXiv 2204.09179).

    Args:
        dim: D.
        num_experts: E.
        proj_dim: width of the small space; default half the experts, at least 2.
        temperature: τ at the start.
        min_temperature: what τ stays above; logits lie within ±1/min_temperature.

    Parameters: `projection` (proj_dim, D), `weight` (E, proj_dim), `log_temperature` (1,).
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        proj_dim: int | None = None,
        temperature: float = 0.3,
        min_temperature: float = 0.01,
    ) -> None:
        super().__init__()
        proj_dim = max(num_experts // 2, 2) if proj_dim is None else proj_dim
        if proj_dim < 1:
            raise ConfigError(f"cosine gate: proj_dim = {proj_dim} must be ≥ 1")
        if not 0 < min_temperature < temperature < math.inf:
            raise ConfigError(
                f"cosine gate: temperature = {temperature} must be above min_temperature = {min_temperature}, "
                "and that above 0"
            )
        self.temperature, self.min_temperature = temperature, min_temperature
        self.projection = nn.Parameter(torch.empty(proj_dim, dim))
        self.weight = nn.Parameter(torch.empty(num_experts, proj_dim))
        self.log_temperature = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both matrices normal with standard deviation 1/√(inputs), and start at `temperature`."""
        for matrix in (self.projection, self.weight):
            nn.init.normal_(matrix, std=1 / math.sqrt(matrix.shape[1]))
        nn.init.constant_(self.log_temperature, math.log(self.temperature - self.min_temperature))

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """Return the logits, at least fp32."""
        dtype = accumulation_dtype(x.dtype)
        with without_autocast(x.device):
            token = _unit(F.linear(x.to(dtype), self.projection.to(dtype)))
            cosine = F.linear(token, _unit(self.weight.to(dtype)))
            return cosine / (self.min_temperature + self.log_temperature.to(dtype).exp())


def _unit(vectors: Tensor) -> Tensor:
    return vectors * (vectors.square().sum(-1, keepdim=True) + 1e-12).rsqrt()
