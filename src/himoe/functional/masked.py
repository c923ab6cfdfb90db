"""Means over the real tokens of a batch, with no host sync and no data-dependent shape."""

from jaxtyping import Bool, Float
from torch import Tensor


def masked_sum(values: Float[Tensor, "T *rest"], mask: Bool[Tensor, " T"] | None) -> Float[Tensor, "*rest"]:
    """Sum over real tokens."""
    if mask is None:
        return values.sum(0)
    return values.where(mask.view(-1, *(1,) * (values.ndim - 1)), 0).sum(0)


def token_count(values: Float[Tensor, "T *rest"], mask: Bool[Tensor, " T"] | None) -> Float[Tensor, ""]:
    """Number of real tokens, as a tensor of the values' dtype on their device."""
    return values.new_full((), values.shape[0]) if mask is None else mask.sum().to(values.dtype)


def masked_mean(values: Float[Tensor, "T *rest"], mask: Bool[Tensor, " T"] | None) -> Float[Tensor, "*rest"]:
    """Mean over real tokens; 0 when there is none."""
    if mask is None and values.shape[0]:
        return values.mean(0)
    return masked_sum(values, mask) / token_count(values, mask).clamp(min=1)
