"""Dense networks: the layers that have no experts, and the shared expert beside those that have.

`GatedNetwork` puts a gate before any of them, as Qwen does before its shared expert.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from himoe.nn.gate import Gate


class SwiGLU(nn.Module):
    """One dense network down·(silu(gate·x)·(up·x)): a dense layer, or the shared expert of an MoE layer.

    Args:
        dim: D.
        hidden_dim: F.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Return the network's output."""
        gate, value = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * value)


def _squared_relu(hidden: Tensor) -> Tensor:
    return F.relu(hidden).square()


class _MLP(nn.Module):
    """Two layers without biases; the activation is the subclass's."""

    activation: ClassVar[Callable[[Tensor], Tensor]]

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Return the network's output."""
        return self.down_proj(type(self).activation(self.up_proj(x)))


class GELUMLP(_MLP):
    """One dense network down·gelu(up·x), the exact gelu.

    Args:
        dim: D.
        hidden_dim: F.
    """

    activation = F.gelu


class ReLUMLP(_MLP):
    """One dense network down·max(up·x, 0).

    Args:
        dim: D.
        hidden_dim: F.
    """

    activation = F.relu


class ReLU2MLP(_MLP):
    """One dense network down·max(up·x, 0)² (Primer, arXiv 2109.08668).

    Args:
        dim: D.
        hidden_dim: F.
    """

    activation = _squared_relu


class GatedNetwork(nn.Module):
    """A network weighed token by token, sigmoid(w·x)·network(x), as Qwen's shared expert is (arXiv 2407.10671).

    The weight is a routing decision, so it is computed in fp32 whatever the autocast and the model's dtype, and cast to
    the network's output only at the end; Qwen's code computes it in the model's dtype. Equal in fp32.

    Args:
        network: (…, D) → (…, D).
        dim: D.
    """

    def __init__(self, network: nn.Module, dim: int) -> None:
        super().__init__()
        self.network = network
        self.gate = Gate(dim, 1)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Return the weighed output."""
        y = self.network(x)
        return y * torch.sigmoid(self.gate(x)).to(y.dtype)
