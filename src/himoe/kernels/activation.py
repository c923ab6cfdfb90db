"""The activations of an expert and their derivatives, one line of a table each.

`swiglu`: a = silu(gate)·value, the gate is the first half of the up projection's output, the value the second.
`gelu`: a = gelu(h), the exact form with erf. `relu`: a = max(h, 0). `relu2`: a = max(h, 0)² (Primer, arXiv 2109.08668).
Both ReLUs have the derivative 0 at 0. Every function writes into memory that it is given.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Activation(NamedTuple):
    """An activation as the kernels use it; its functions return what they wrote.

    Attributes:
        rows: rows of the up projection for one unit of the expert's hidden width; H = rows·F.
        forward: (the up projection's output (n, H), out (n, F)) → out, the activation.
        backward: (hidden (n, H), the activation's gradient (n, F), out (n, H)) → out, the gradient of hidden.
        shared: (hidden, out (n, F), space (n, H)) → as `forward`, and leaves in `space` what `backward` would compute
            again; None where that is nothing.
        backward_of_shared: (hidden, the activation's gradient, space as `shared` left it) → space, as `backward`.
    """

    rows: int
    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]
    shared: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    backward_of_shared: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None


def _swiglu(hidden: Tensor, out: Tensor) -> Tensor:
    gate, value = hidden.chunk(2, dim=-1)
    return torch.ops.aten.silu.out(gate, out=out).mul_(value)


def _swiglu_backward(hidden: Tensor, grad: Tensor, out: Tensor) -> Tensor:
    (gate, value), (d_gate, d_value) = hidden.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(grad, F.silu(gate), out=d_value)
    torch.mul(grad, value, out=d_gate)
    torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
    return out


def _swiglu_shared(hidden: Tensor, out: Tensor, space: Tensor) -> Tensor:
    """Leave σ and silu = σ·gate: one sigmoid, which costs as much as six products."""
    (gate, value), (sigmoid, silu) = hidden.chunk(2, dim=-1), space.chunk(2, dim=-1)
    torch.sigmoid(gate, out=sigmoid)
    return torch.mul(torch.mul(sigmoid, gate, out=silu), value, out=out)


def _swiglu_backward_of_shared(hidden: Tensor, grad: Tensor, space: Tensor) -> Tensor:
    """silu' = silu + σ·(1 − silu): all the way from silu to 1, which `lerp` computes without cancellation."""
    value = hidden.chunk(2, dim=-1)[1]
    sigmoid, silu = space.chunk(2, dim=-1)
    torch.lerp(silu, silu.new_ones(()), sigmoid, out=sigmoid).mul_(value).mul_(grad)
    silu.mul_(grad)
    return space


def _gelu(hidden: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.gelu.out(hidden, out=out)


def _gelu_backward(hidden: Tensor, grad: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward.grad_input(grad, hidden, grad_input=out)


def _relu(hidden: Tensor, out: Tensor) -> Tensor:
    return torch.clamp_min(hidden, 0, out=out)


def _relu_backward(hidden: Tensor, grad: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward.grad_input(grad, hidden, 0, grad_input=out)


def _relu2(hidden: Tensor, out: Tensor) -> Tensor:
    return _relu(hidden, out).square_()


def _relu2_backward(hidden: Tensor, grad: Tensor, out: Tensor) -> Tensor:
    return _relu(hidden, out).mul_(grad).mul_(2)


ACTIVATIONS = {
    "swiglu": Activation(2, _swiglu, _swiglu_backward, _swiglu_shared, _swiglu_backward_of_shared),
    "gelu": Activation(1, _gelu, _gelu_backward),
    "relu": Activation(1, _relu, _relu_backward),
    "relu2": Activation(1, _relu2, _relu2_backward),
}
