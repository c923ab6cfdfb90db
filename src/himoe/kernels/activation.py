"""The two activations of an expert and their derivatives, in place where the buffers are ours.

`swiglu`: a = silu(gate)·value, the gate is the first half of the up projection's output, the value the second.
`gelu`: a = gelu(h), the exact form with erf.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

HIDDEN_PER_UNIT = {"swiglu": 2, "gelu": 1}  # rows of the up projection for one unit of expert hidden width F


def forward(hidden: Float[Tensor, "n H"], activation: str) -> Float[Tensor, "n F"]:
    """Return the activation a of the up projection's output."""
    if activation == "swiglu":
        gate, value = hidden.chunk(2, dim=-1)
        return F.silu(gate).mul_(value)
    return F.gelu(hidden)


def backward(hidden: Float[Tensor, "n H"], grad: Float[Tensor, "n F"], activation: str) -> Float[Tensor, "n H"]:
    """Return the gradient of `hidden`, given that of the activation."""
    if activation == "swiglu":
        gate, value = hidden.chunk(2, dim=-1)
        out = torch.empty_like(hidden)
        d_gate, d_value = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=d_value)
        torch.mul(grad, value, out=d_gate)
        d_gate.copy_(torch.ops.aten.silu_backward(d_gate, gate))
        return out
    return torch.ops.aten.gelu_backward(grad, hidden)
