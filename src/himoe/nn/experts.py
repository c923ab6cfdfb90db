"""The experts of one layer as two stacked weights, in the layout of most of transformers v5 and vLLM."""

import math
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from himoe.errors import ConfigError
from himoe.functional.precision import autocast_dtype
from himoe.kernels import choose_backend, expert_mlp
from himoe.kernels.activation import ACTIVATIONS


class _Experts(nn.Module):
    """E two-layer networks of one size without biases; the activation is the subclass's."""

    activation: ClassVar[str]
    up_proj_name: ClassVar[str] = "up_proj"

    def __init__(self, num_experts: int, dim: int, hidden_dim: int, *, backend: str = "auto") -> None:
        super().__init__()
        if min(num_experts, dim, hidden_dim) < 1:
            raise ConfigError(
                f"experts: num_experts = {num_experts}, dim = {dim}, hidden_dim = {hidden_dim} must be ≥ 1"
            )
        self.num_experts, self.dim, self.hidden_dim, self.backend = num_experts, dim, hidden_dim, backend
        up_proj = nn.Parameter(torch.empty(num_experts, ACTIVATIONS[self.activation].rows * hidden_dim, dim))
        self.register_parameter(self.up_proj_name, up_proj)
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both weights normal with standard deviation 1/√(inputs)."""
        nn.init.normal_(self.get_parameter(self.up_proj_name), std=1 / math.sqrt(self.dim))
        nn.init.normal_(self.down_proj, std=1 / math.sqrt(self.hidden_dim))

    @property
    def kernel(self) -> str:
        """The kernel that runs on this machine under the autocast in force, which is what `auto` stands for."""
        dtype = autocast_dtype(self.down_proj) or self.down_proj.dtype
        up_proj, down_proj = (
            weight.new_empty(0, *weight.shape[1:], dtype=dtype)
            for weight in (self.get_parameter(self.up_proj_name), self.down_proj)
        )
        return choose_backend(self.backend, down_proj.new_empty(0, self.dim), up_proj, down_proj)

    def forward(
        self,
        x: Float[Tensor, "T D"],
        expert_ids: Int[Tensor, "T K"],
        weights: Float[Tensor, "T K"],
        kept: Bool[Tensor, "T K"],
    ) -> Float[Tensor, "T D"]:
        """Return Σ_k weight·expert(x) over each token's kept pairs."""
        up_proj = self.get_parameter(self.up_proj_name)
        return expert_mlp(
            x, expert_ids, weights, kept, up_proj, self.down_proj, activation=self.activation, backend=self.backend
        )

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"num_experts={self.num_experts}, dim={self.dim}, hidden_dim={self.hidden_dim}, backend={self.backend!r}"


class SwiGLUExperts(_Experts):
    """E experts down·(silu(gate·x)·(up·x)).

    Args:
        num_experts: E.
        dim: D.
        hidden_dim: F.
        backend: of the kernel, see `expert_mlp`.

    Parameters: `gate_up_proj` (E, 2F, D), gate rows first; `down_proj` (E, D, F).
    """

    activation, up_proj_name = "swiglu", "gate_up_proj"


class GELUExperts(_Experts):
    """E experts down·gelu(up·x), the exact gelu.

    Args:
        num_experts: E.
        dim: D.
        hidden_dim: F.
        backend: of the kernel, see `expert_mlp`.

    Parameters: `up_proj` (E, F, D); `down_proj` (E, D, F).
    """

    activation = "gelu"


class ReLUExperts(_Experts):
    """E experts down·max(up·x, 0), as in Switch Transformers (arXiv 2101.03961).

    Args:
        num_experts: E.
        dim: D.
        hidden_dim: F.
        backend: of the kernel, see `expert_mlp`.

    Parameters: `up_proj` (E, F, D); `down_proj` (E, D, F).
    """

    activation = "relu"


class ReLU2Experts(_Experts):
    """E experts down·max(up·x, 0)², the squared ReLU of Primer (arXiv 2109.08668).

    Args:
        num_experts: E.
        dim: D.
        hidden_dim: F.
        backend: of the kernel, see `expert_mlp`.

    Parameters: `up_proj` (E, F, D); `down_proj` (E, D, F).
    """

    activation = "relu2"
