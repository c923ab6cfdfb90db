"""One function for the expert MLP: y_t = Σ_k weight·down_e(act(up_e(x_t))), with interchangeable backends.

Backward keeps x and the up projection's output, nothing else of size T·K: the routing weight is folded into the
activation, so the down projection's output is never needed again, and the activation is computed a second time.
Forward and backward are registered operators with shape rules, so the layer compiles as one graph, exports, and runs
on the meta device in every dtype.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from himoe.errors import ConfigError
from himoe.functional.dispatch import SortedPairs, sort_by_expert
from himoe.functional.precision import autocast_dtype
from himoe.kernels import flops, grouped, loop, native, triton
from himoe.kernels.activation import ACTIVATIONS

BACKENDS = {"loop": loop, "grouped": grouped, "native": native, "triton": triton}


def expert_mlp(
    x: Float[Tensor, "T D"],
    expert_ids: Int[Tensor, "T K"],
    weights: Float[Tensor, "T K"],
    kept: Bool[Tensor, "T K"],
    up_proj: Float[Tensor, "E H D"],
    down_proj: Float[Tensor, "E D F"],
    *,
    activation: str = "swiglu",
    backend: str = "auto",
) -> Float[Tensor, "T D"]:
    """Send every kept pair through its expert and add the weighted results per token.

    Args:
        x: (T, D) tokens. Under autocast, x and the projections are cast to the autocast dtype.
        expert_ids: (T, K), each in 0 … E-1.
        weights: (T, K) combine weights, any floating dtype.
        kept: (T, K); other pairs contribute nothing, get no gradient and cost no product.
        up_proj: (E, H, D), H = 2F for swiglu (gate first, then value), F for the others.
        down_proj: (E, D, F).
        activation: `swiglu`, `gelu`, `relu` or `relu2`.
        backend: `loop`, `grouped`, `native`, `triton`, or `auto`: native on a CPU; on a GPU triton, if it is installed
            and the GPU is NVIDIA's, of capability 8.0 or more, and else grouped; loop where these cannot run.

    Raises:
        ConfigError: an unknown backend, projections that do not fit x or the activation, or pairs that do not fit x.
        ConfigError, IndexError or RuntimeError: an id that is no expert's, by who finds it: `native` or torch.
    """
    _check_shapes(x, up_proj, down_proj, activation)
    _check_pairs(x, expert_ids, weights, kept)
    if (dtype := autocast_dtype(x)) is not None:
        x, up_proj, down_proj = x.to(dtype), up_proj.to(dtype), down_proj.to(dtype)
    up_proj, down_proj = up_proj.contiguous(), down_proj.contiguous()  # gradients are, and the shape rules say so
    if not (x.dtype == up_proj.dtype == down_proj.dtype and x.device == up_proj.device == down_proj.device):
        raise ConfigError(
            f"expert_mlp: x is {x.dtype} on {x.device}, up_proj {up_proj.dtype} on {up_proj.device}, down_proj "
            f"{down_proj.dtype} on {down_proj.device}; all must be the same, or use autocast"
        )
    chosen = choose_backend(backend, x, up_proj, down_proj)
    rows = sort_pairs(chosen, expert_ids, kept, up_proj.shape[0])
    y, _ = _expert_mlp(x.contiguous(), weights.contiguous(), *rows, up_proj, down_proj, activation, chosen)
    return y


def choose_backend(backend: str, x: Tensor, up_proj: Tensor, down_proj: Tensor) -> str:
    """Return the backend that will run: `loop` stands in where another cannot take dtype, shapes or device."""
    if backend != "auto" and backend not in BACKENDS:
        raise ConfigError(f"backend = {backend!r}: must be auto, {', '.join(BACKENDS)}")
    wanted = _fastest(x.device) if backend == "auto" else backend
    return wanted if wanted == "loop" or BACKENDS[wanted].supports(x, up_proj, down_proj) else "loop"


def _fastest(device: torch.device) -> str:
    if device.type == "cpu":
        return "native"
    return "triton" if triton.suits(device) else "grouped"


def sort_pairs(
    backend: str, expert_ids: Int[Tensor, "T K"], kept: Bool[Tensor, "T K"], num_experts: int
) -> SortedPairs:
    """Sort the pairs by expert as a backend does it. One that has its own way has a function `sort`."""
    return getattr(BACKENDS[backend], "sort", sort_by_expert)(expert_ids, kept, num_experts)


def backend_status() -> dict[str, str | None]:
    """Return for every backend why it cannot run on this machine, None where it can.

    A backend that needs something, such as a compiler or a GPU, has a function `unavailable() -> str | None`.
    """
    return {name: getattr(backend, "unavailable", lambda: None)() for name, backend in BACKENDS.items()}


def _check_shapes(x: Tensor, up_proj: Tensor, down_proj: Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation = {activation!r}: must be {' or '.join(ACTIVATIONS)}")
    if down_proj.ndim != 3 or 0 in down_proj.shape:
        raise ConfigError(f"expert_mlp: down_proj {tuple(down_proj.shape)} must be (E, D, F), none of them 0")
    num_experts, width, units = down_proj.shape
    expected = (num_experts, ACTIVATIONS[activation].rows * units, width)
    if up_proj.shape != expected or x.shape[-1] != width:
        raise ConfigError(
            f"expert_mlp: x {tuple(x.shape)}, up_proj {tuple(up_proj.shape)} and down_proj {tuple(down_proj.shape)} "
            f"do not fit; with this down_proj, {activation} needs x (T, {width}) and up_proj {expected}"
        )


def _check_pairs(x: Tensor, expert_ids: Tensor, weights: Tensor, kept: Tensor) -> None:
    pairs = expert_ids.shape
    if x.ndim != 2 or pairs[:-1] != x.shape[:1] or 0 in pairs[1:] or weights.shape != pairs or kept.shape != pairs:
        raise ConfigError(
            f"expert_mlp: x {tuple(x.shape)} must be (T, D), and expert_ids {tuple(pairs)}, "
            f"weights {tuple(weights.shape)} and kept {tuple(kept.shape)} all (T, K) with the same T, K ≥ 1"
        )


@torch.library.custom_op("himoe::expert_mlp", mutates_args=())
def _expert_mlp(
    x: Tensor,
    weights: Tensor,
    pair_of_row: Tensor,
    row_of_pair: Tensor,
    offsets: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows = SortedPairs(pair_of_row, row_of_pair, offsets)
    with torch.autocast(x.device.type, enabled=False):
        return BACKENDS[backend].forward(x, weights, rows, up_proj, down_proj, activation)


@_expert_mlp.register_fake
def _(x: Tensor, _weights: Tensor, pair_of_row: Tensor, _row_of_pair: Tensor, _offsets: Tensor, up_proj: Tensor, *_):
    return torch.empty_like(x), x.new_empty(pair_of_row.shape[0], up_proj.shape[1])


@torch.library.custom_op("himoe::expert_mlp_backward", mutates_args=())
def _expert_mlp_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    hidden: Tensor,
    pair_of_row: Tensor,
    row_of_pair: Tensor,
    offsets: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    activation: str,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """Return the gradients that are needed, in the order x, weights, up_proj, down_proj."""
    rows = SortedPairs(pair_of_row, row_of_pair, offsets)
    need_x, need_weights, need_up, need_down = needs
    with torch.autocast(x.device.type, enabled=False):
        grads = BACKENDS[backend].backward(
            grad, x, weights, hidden, rows, up_proj, down_proj, activation, (need_x, need_weights, need_up, need_down)
        )
    return [g for g in grads if g is not None]


@_expert_mlp_backward.register_fake
def _(*arguments):
    _, x, weights, _, _, _, _, up_proj, down_proj, _, _, needs = arguments
    inputs = (x, weights, up_proj, down_proj)
    return [torch.empty_like(t) for t, needed in zip(inputs, needs, strict=True) if needed]


def _setup_context(ctx, inputs, output) -> None:
    x, weights, *rows, up_proj, down_proj, ctx.activation, ctx.backend = inputs
    _, hidden = output
    ctx.mark_non_differentiable(hidden)
    ctx.set_materialize_grads(False)  # or backward would get zeros of hidden's size for a gradient that nobody has
    ctx.save_for_backward(x, weights, hidden, *rows, up_proj, down_proj)


def _backward(ctx, grad: Tensor | None, _grad_hidden: Tensor | None):
    if grad is None:  # what used y has no gradient for it
        return (None,) * len(ctx.needs_input_grad)
    need_x, need_weights, _, _, _, need_up, need_down, _, _ = ctx.needs_input_grad
    needs = [need_x, need_weights, need_up, need_down]
    saved = ctx.saved_tensors
    grads = iter(_expert_mlp_backward(grad.contiguous(), *saved, ctx.activation, ctx.backend, needs))
    d_x, d_weights, d_up, d_down = (next(grads) if needed else None for needed in needs)
    return d_x, d_weights, None, None, None, d_up, d_down, None, None


_expert_mlp.register_autograd(_backward, setup_context=_setup_context)
register_flop_formula(torch.ops.himoe.expert_mlp)(flops.forward)
register_flop_formula(torch.ops.himoe.expert_mlp_backward)(flops.backward)
