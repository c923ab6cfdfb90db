"""Causal self-attention with grouped queries, rotary positions and normalised queries and keys."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from himoe.errors import ConfigError
from himoe.functional.precision import accumulation_dtype
from himoe.models.cache import Buffer


class Attention(nn.Module):
    """Grouped-query attention through `scaled_dot_product_attention`.

    Args:
        dim: D.
        num_heads: query heads; the head width is D / num_heads and must be even.
        num_kv_heads: key and value heads, a divisor of `num_heads`.
        qk_norm: RMS-normalise queries and keys per head before the rotation.
        rope_theta: base of the rotary frequencies (RoFormer, arXiv 2104.09864).
    """

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, *, qk_norm: bool, rope_theta: float) -> None:
        super().__init__()
        if dim % num_heads or num_heads % num_kv_heads or dim // num_heads % 2:
            raise ConfigError(
                f"attention: dim = {dim} must be a multiple of num_heads = {num_heads} with an even quotient, "
                f"and num_heads a multiple of num_kv_heads = {num_kv_heads}"
            )
        self.head_dim, self.rope_theta = dim // num_heads, rope_theta
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.qkv_proj = nn.Linear(dim, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        seen: Bool[Tensor, "B 1 S N"] | None = None,
        cache: tuple[Buffer, Buffer] | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Attend to what `visible` says each position sees; None is every position up to its own.

        `cache` holds the keys and values of the positions before x, and gets those of x; N counts both.
        """
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key, value = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        first = 0 if cache is None else cache[0].length
        position = torch.arange(first, first + x.shape[1], device=x.device, dtype=accumulation_dtype(x.dtype))
        cos, sin = rotary_angles(position, self.head_dim, self.rope_theta)
        # Back in the dtype of x: under autocast RMSNorm has no fused kernel for bf16 input with an fp32 weight.
        query = rotate(self.q_norm(query.to(x.dtype)), cos, sin).to(value.dtype)
        key = rotate(self.k_norm(key.to(x.dtype)), cos, sin).to(value.dtype)
        if cache is not None:
            key, value = cache[0].extend(key), cache[1].extend(value)
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=seen,
            is_causal=seen is None and first == 0,
            enable_gqa=self.num_kv_heads < self.num_heads,
        )
        return self.out_proj(mixed.transpose(1, 2).flatten(-2))


def visible(
    mask: Bool[Tensor, "B N"] | None,
    document_ids: Int[Tensor, "B N"] | None,
    *,
    length: int,
    first: int = 0,
    device: torch.device | None = None,
) -> Bool[Tensor, "#B 1 S N"] | None:
    """Return which of N = `length` positions each one from `first` on sees: the real ones of its own document up to it.

    Every position sees itself too, so that no row of padding is empty. None where that is every position up to its
    own, and those are all there are or all before it.
    """
    if mask is None and document_ids is None and (first == 0 or first == length - 1):
        return None
    position = torch.arange(length, device=device)
    own = position[first:, None]
    seen = (position <= own)[None]
    if mask is not None:
        seen = seen & (mask[:, None, :] | (position == own))
    if document_ids is not None:
        seen = seen & (document_ids[:, None, :] == document_ids[:, first:, None])
    return seen[:, None]


def rotary_angles(position: Float[Tensor, " S"], head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position·θ^(−2i/head_dim), each (S, head_dim/2) in the dtype of `position`."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=position.device, dtype=position.dtype) / head_dim)
    angle = torch.outer(position, frequency)
    return angle.cos(), angle.sin()


def rotate(x: Float[Tensor, "B H S d"], cos: Float[Tensor, "S d/2"], sin: Float[Tensor, "S d/2"]) -> Tensor:
    """Rotate the two halves of every head by the angle of its position."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
