"""The cross-entropy of a head in chunks: a hand-worked case, torch's own over odd shapes, dtypes, and its memory."""

import math

import pytest
import torch
from torch.nn import functional as F

from himoe.errors import ConfigError
from himoe.functional.cross_entropy import linear_cross_entropy


def problem(tokens, width, vocabulary, dtype=torch.float64):
    generator = torch.Generator().manual_seed(tokens + vocabulary)
    x = torch.randn(tokens, width, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=dtype, requires_grad=True)
    return x, weight, torch.randint(vocabulary, (tokens,), generator=generator)


def test_two_tokens_by_hand():
    x = torch.tensor([[1.0], [0.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3)]], requires_grad=True)  # probabilities ¼ and ¾, then ½ and ½
    loss = linear_cross_entropy(x, weight, torch.tensor([1, 0]))
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    loss.backward()
    assert x.grad.flatten().tolist() == pytest.approx([-0.25 * math.log(3) / 2, 0.5 * math.log(3) / 2])
    assert weight.grad.flatten().tolist() == pytest.approx([0.125, -0.125])


@pytest.mark.parametrize(("tokens", "width", "vocabulary"), [(1, 1, 1), (1, 3, 7), (13, 5, 2), (29, 8, 31)])
@pytest.mark.parametrize("chunk", [1, 5, 13, 100, None])
def test_it_is_torchs_own_whatever_the_chunk(tokens, width, vocabulary, chunk):
    x, weight, targets = problem(tokens, width, vocabulary)
    expected = F.cross_entropy(x @ weight.T, targets)
    found = linear_cross_entropy(x, weight, targets, chunk=chunk)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(
        torch.autograd.grad(found * 3, (x, weight)), torch.autograd.grad(expected * 3, (x, weight)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_gradients_that_nobody_wants_are_not_taken():
    x, weight, targets = problem(9, 4, 6)
    both = torch.autograd.grad(linear_cross_entropy(x, weight, targets), (x, weight))
    torch.testing.assert_close(torch.autograd.grad(linear_cross_entropy(x, weight.detach(), targets), x)[0], both[0])
    torch.testing.assert_close(
        torch.autograd.grad(linear_cross_entropy(x.detach(), weight, targets), weight)[0], both[1]
    )
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, targets).requires_grad


@pytest.mark.parametrize("chunk", [2, None])
def test_padding_counts_for_nothing_whatever_it_holds(chunk):
    x, weight, targets = problem(9, 4, 6)
    mask = torch.tensor([True, False, True, True, False, False, True, True, False])
    expected = linear_cross_entropy(x[mask], weight, targets[mask])
    with torch.no_grad():
        x[~mask] = torch.nan
    found = linear_cross_entropy(x, weight, targets.where(mask, -100), mask, chunk=chunk)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(
        torch.autograd.grad(found, (x, weight)), torch.autograd.grad(expected, (x, weight)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    assert linear_cross_entropy(x, weight, targets, torch.zeros_like(mask)).item() == 0


def test_a_chunk_has_a_token():
    with pytest.raises(ConfigError, match="chunk = 0 must be at least 1"):
        linear_cross_entropy(*problem(9, 4, 6), chunk=0)


def test_no_tokens_lose_nothing():
    x, weight, targets = problem(0, 4, 6)
    loss = linear_cross_entropy(x, weight, targets)
    loss.backward()
    assert loss.item() == 0 and not weight.grad.any() and x.grad.shape == (0, 4)


def test_large_logits_do_not_overflow():
    x, weight, targets = problem(9, 4, 6, torch.float32)
    loss = linear_cross_entropy(x * 1e4, weight, targets)
    torch.testing.assert_close(loss, F.cross_entropy(x * 1e4 @ weight.T, targets))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, weight)))


def test_autocast_multiplies_in_bf16_and_sums_in_fp32():
    x, weight, targets = problem(64, 16, 40, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(x, weight, targets, chunk=7)
        logits = F.linear(x, weight)
    expected = F.cross_entropy(logits.float(), targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(
        torch.autograd.grad(found, (x, weight)), torch.autograd.grad(expected, (x, weight)), strict=True
    ):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-4)


def test_nothing_as_large_as_the_logits_is_kept():
    x, weight, targets = problem(50, 4, 300)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        linear_cross_entropy(x, weight, targets, chunk=10).backward()
    assert sum(kept) == x.numel() + weight.numel()
