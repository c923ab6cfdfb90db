"""Attention against plain loops, rotary positions, grouped queries."""

import math

import pytest
import torch
from torch import nn

from himoe.errors import ConfigError
from himoe.models.attention import Attention, rotary_angles, rotate


def make_attention(heads=4, kv_heads=2, *, qk_norm=True, dim=32, theta=100.0):
    torch.manual_seed(0)
    attention = Attention(dim, heads, kv_heads, qk_norm=qk_norm, rope_theta=theta)
    for module in attention.modules():
        if isinstance(module, nn.RMSNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return attention


def rope(vector, position, theta):
    """Rotate the pairs (i, i + d/2) of one head's vector, number by number."""
    d, out = len(vector), vector.clone()
    for i in range(d // 2):
        angle = position * theta ** (-2 * i / d)
        a, b = vector[i], vector[i + d // 2]
        out[i], out[i + d // 2] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    return out


def by_loops(attention, x):
    heads, kv_heads, d = attention.num_heads, attention.num_kv_heads, attention.head_dim
    rows = []
    for sequence in x:
        qkv = (sequence @ attention.qkv_proj.weight.T).unflatten(-1, (-1, d))
        mixed = torch.zeros(len(sequence), heads, d)
        for h in range(heads):
            group = h // (heads // kv_heads)
            q = [rope(attention.q_norm(v), s, attention.rope_theta) for s, v in enumerate(qkv[:, h])]
            k = [rope(attention.k_norm(v), s, attention.rope_theta) for s, v in enumerate(qkv[:, heads + group])]
            v = qkv[:, heads + kv_heads + group]
            for s in range(len(sequence)):
                scores = torch.stack([q[s] @ k[t] / d**0.5 for t in range(s + 1)]).softmax(0)
                mixed[s, h] = scores @ v[: s + 1]
        rows.append(mixed.flatten(-2) @ attention.out_proj.weight.T)
    return torch.stack(rows)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize("qk_norm", [True, False])
@torch.no_grad()
def test_attention_is_the_plain_loops(heads, kv_heads, qk_norm):
    attention, x = make_attention(heads, kv_heads, qk_norm=qk_norm), torch.randn(2, 5, 32)
    torch.testing.assert_close(attention(x), by_loops(attention, x), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_grouped_queries_are_full_heads_with_repeated_keys_and_values():
    grouped, full = make_attention(4, 2), make_attention(4, 4)
    query, key, value = grouped.qkv_proj.weight.unflatten(0, (-1, 8)).split([4, 2, 2])
    repeated = torch.cat([query, key.repeat_interleave(2, 0), value.repeat_interleave(2, 0)])
    full.load_state_dict(grouped.state_dict() | {"qkv_proj.weight": repeated.flatten(0, 1)})
    x = torch.randn(2, 6, 32)
    torch.testing.assert_close(grouped(x), full(x))


def test_rotation_by_position():
    x = torch.randn(1, 1, 6, 8, dtype=torch.float64)
    rotated = rotate(x, *rotary_angles(torch.arange(6.0, dtype=x.dtype), 8, 100.0))
    for position in range(6):
        expected = rope(x[0, 0, position], position, 100.0)
        torch.testing.assert_close(rotated[0, 0, position], expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1), atol=1e-12, rtol=1e-12)
    assert torch.equal(rotated[0, 0, 0], x[0, 0, 0])


def test_products_of_rotated_queries_and_keys_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    angles = rotary_angles(torch.arange(40.0, dtype=q.dtype), 16, 10_000.0)
    queries, keys = (rotate(v.expand(1, 1, 40, 16), *angles)[0, 0] for v in (q, k))
    products = queries @ keys.T
    for distance in (-20, -3, 0, 1, 17):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), atol=1e-5, rtol=1e-5)
    assert products[0].std() > 0.1  # and it does depend on the distance


def test_later_positions_change_nothing_before_them():
    attention, x = make_attention(), torch.randn(2, 8, 32)
    changed = x.clone()
    changed[:, 5:] += 3
    one, other = attention(x), attention(changed)
    torch.testing.assert_close(one[:, :5], other[:, :5])
    assert not torch.allclose(one[:, 5:], other[:, 5:])


@pytest.mark.parametrize("sizes", [(30, 4, 4), (32, 4, 3), (12, 4, 4)])
def test_heads_that_do_not_fit_are_named(sizes):
    dim, heads, kv_heads = sizes
    with pytest.raises(
        ConfigError, match=f"dim = {dim} must be a multiple of num_heads = {heads} with an even quotient"
    ):
        Attention(dim, heads, kv_heads, qk_norm=True, rope_theta=1e4)
