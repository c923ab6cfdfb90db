"""What `torch.utils.flop_counter.FlopCounterMode` counts for the expert MLP: 2 a multiply-add, the products alone.

Which pairs are kept is data, so every pair counts: an upper bound, exact where nothing is dropped or padded.
"""

from typing import Any

Shape = tuple[int, ...]


def forward(x: Shape, weights: Shape, *arguments: Any, out_shape: Any = None) -> int:  # noqa: ARG001
    """Return 2·T·K·(H·D + D·F) from the shapes of the operator's tensors and its other arguments."""
    *_, up, down, _activation, _backend = arguments
    return 2 * weights[0] * weights[1] * (up[1] * up[2] + down[1] * down[2])


def backward(grad: Shape, x: Shape, weights: Shape, *arguments: Any, out_shape: Any = None) -> int:  # noqa: ARG001
    """Return 2·T·K times the sizes of the products that the needed gradients take.

    The gradient of the activation, D·F, comes before those of x, of the weights and of the up projection.
    """
    *_, up, down, _activation, _backend, (need_x, need_weights, need_up, need_down) = arguments
    of_up, of_down = up[1] * up[2], down[1] * down[2]
    through = need_x or need_weights or need_up
    return 2 * weights[0] * weights[1] * (of_up * (need_x + need_up) + of_down * (through + need_down))
