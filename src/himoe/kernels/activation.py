"""The activations of an expert and their derivatives, one line of a table each.

`swiglu`: a = silu(gate)·value, the gate is the first half of the up projection's output, the value the second.
`gelu`: a = gelu(h), the exact form with erf. `relu`: a = max(h, 0). `relu2`: a = max(h, 0)² (Primer, arXiv 2109.08668).
Both ReLUs have the derivative 0 at 0. Every function returns a tensor of its own, which the kernels go on to change.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Activation(NamedTuple):
    """An activation as the kernels use it.

    Attributes:
        rows: rows of the up projection for one unit of the expert's hidden width; H = rows·F.
        forward: the up projection's output (n, H) → the activation (n, F).
        backward: (n, H) and the activation's gradient (n, F) → the gradient of the up projection's output (n, H).
        shared: hidden → the activation and what `backward` would compute again; None where that is nothing.
        backward_of_shared: (hidden, what `shared` gave, the activation's gradient) → as `backward`; changes the second.
    """

    rows: int
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    shared: Callable[[Tensor], tuple[Tensor, tuple[Tensor, Tensor]]] | None = None
    backward_of_shared: Callable[[Tensor, tuple[Tensor, Tensor], Tensor], Tensor] | None = None


def _swiglu(hidden: Tensor) -> Tensor:
    gate, value = hidden.chunk(2, dim=-1)
    return F.silu(gate).mul_(value)


def _swiglu_backward(hidden: Tensor, grad: Tensor) -> Tensor:
    gate, value = hidden.chunk(2, dim=-1)
    out = torch.empty_like(hidden)
    d_gate, d_value = out.chunk(2, dim=-1)
    torch.mul(grad, F.silu(gate), out=d_value)
    torch.mul(grad, value, out=d_gate)
    torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
    return out


def _swiglu_shared(hidden: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return silu·value, σ and silu = σ·gate: one sigmoid, which costs as much as six products."""
    gate, value = hidden.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = sigmoid * gate
    return silu * value, (sigmoid, silu)


def _swiglu_backward_of_shared(hidden: Tensor, shared: tuple[Tensor, Tensor], grad: Tensor) -> Tensor:
    """silu' = silu + σ·(1 − silu)."""
    _, value = hidden.chunk(2, dim=-1)
    sigmoid, silu = shared
    out = torch.empty_like(hidden)
    d_gate, d_value = out.chunk(2, dim=-1)
    torch.mul(grad, silu, out=d_value)
    slope = sigmoid.addcmul_(sigmoid, silu, value=-1).add_(silu)
    torch.mul(slope.mul_(value), grad, out=d_gate)
    return out


def _gelu_backward(hidden: Tensor, grad: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, hidden)


def _relu_backward(hidden: Tensor, grad: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(grad, hidden, 0)


def _relu2(hidden: Tensor) -> Tensor:
    return F.relu(hidden).square_()


def _relu2_backward(hidden: Tensor, grad: Tensor) -> Tensor:
    return F.relu(hidden).mul_(grad).mul_(2)


ACTIVATIONS = {
    "swiglu": Activation(2, _swiglu, _swiglu_backward, _swiglu_shared, _swiglu_backward_of_shared),
    "gelu": Activation(1, F.gelu, _gelu_backward),
    "relu": Activation(1, F.relu, _relu_backward),
    "relu2": Activation(1, _relu2, _relu2_backward),
}
