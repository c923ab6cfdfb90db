"""The mean cross-entropy of a linear head, a chunk of tokens at a time: the logits never exist as a whole.

    loss = mean_t (log Σ_v exp(x_t·w_v) − x_t·w_target(t))

A chunk's gradient is known as soon as its logits are, p − 1[v = target], so it is taken in the forward pass and the
logits are forgotten: beside the gradients of x and of the head, memory for one chunk is all it needs. It has a first
derivative only: what differentiates its gradient again finds 0.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from himoe.errors import ConfigError
from himoe.functional.precision import accumulation_dtype, autocast_dtype

CHUNK = 2**22
"""Logits of a chunk, 16 MiB in fp32."""
LEAST_ROWS = 512  # of a chunk: each one goes through the whole gradient of the head once


def linear_cross_entropy(
    x: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    mask: Bool[Tensor, " N"] | None = None,
    *,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of `x @ weight.T` against the targets, at least in fp32; 0 for no tokens.

    Args:
        x: (N, D). Under autocast, x and the weight are cast to the autocast dtype for the products.
        weight: (V, D).
        targets: (N,) int64, each in 0 … V-1; padding may hold anything.
        mask: (N,) True for real tokens, over which the mean is taken; None when all are.
        chunk: tokens at a time; by default 512, or more where a chunk then has 2²² logits at most.
    """
    if chunk is None:
        chunk = max(LEAST_ROWS, CHUNK // weight.shape[0])
    if chunk < 1:
        raise ConfigError(f"linear_cross_entropy: chunk = {chunk} must be at least 1")
    if mask is None:
        mask = torch.ones_like(targets, dtype=torch.bool)
    needs = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, weight))
    dtype = autocast_dtype(x) or x.dtype
    return _LinearCrossEntropy.apply(x, weight, targets, mask, chunk, dtype, needs)  # type: ignore[return-value]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        mask: Tensor,
        chunk: int,
        dtype: torch.dtype,
        needs: tuple[bool, bool],
    ) -> Tensor:
        need_x, need_weight = needs
        wide = accumulation_dtype(dtype)
        head, total = weight.to(dtype), torch.zeros((), dtype=torch.float64, device=x.device)
        d_x = torch.empty_like(x) if need_x else None
        d_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        for start in range(0, len(x), chunk):
            here = slice(start, start + chunk)
            real = mask[here, None]
            rows, target = x[here].where(real, 0).to(dtype), targets[here, None].where(real, 0)
            values = F.log_softmax((rows @ head.T).to(wide), dim=-1)
            total -= values.gather(1, target).where(real, 0).sum(dtype=torch.float64)
            if d_x is None and d_weight is None:
                continue
            values.exp_().scatter_add_(1, target, values.new_full((), -1).expand_as(target))
            narrow = values.to(dtype)  # padding has rows of zeros, which give the head no gradient
            if d_x is not None:
                d_x[here] = (narrow @ head).where(real, 0)
            if d_weight is not None and dtype == wide:
                torch.addmm(d_weight, narrow.T, rows, out=d_weight)  # FlopCounterMode does not know addmm_
            elif d_weight is not None:
                d_weight += narrow.T @ rows
        ctx.save_for_backward(d_x, None if d_weight is None else d_weight.to(weight.dtype))
        ctx.count = mask.sum().clamp(min=1)
        return (total / ctx.count).to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        d_x, d_weight = ctx.saved_tensors
        factor = grad / ctx.count
        return *(None if g is None else g * factor for g in (d_x, d_weight)), None, None, None, None, None
