"""Quantiles from integer histograms: against sorted values, and sums that do not depend on how tokens are split."""

import math

import pytest
import torch

from himoe.functional import histogram as module
from himoe.functional.histogram import BINS, edges, histogram, quantile

EDGES = edges(torch.device("cpu"))


def bin_of(value: float) -> int:
    """The bin of a value by a plain search: its edge nearer to 0 belongs to it, and the outermost ones are open."""
    inner = EDGES[1:-1].tolist()
    return sum(edge < value or (edge == value and value >= 0) for edge in inner)


def normal(tokens: int, num_experts: int, seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, num_experts, generator=generator, dtype=torch.float64).to(dtype)


def test_the_edges_rise_are_symmetric_and_finest_at_0():
    assert EDGES.shape == (BINS + 1,) and (EDGES.diff() > 0).all()
    assert torch.equal(EDGES, -EDGES.flip(0))
    assert EDGES[BINS // 2] == 0 and EDGES[-1] == 256
    nearer = EDGES[:-1].abs().minimum(EDGES[1:].abs())
    widths = EDGES.diff()
    assert widths.min() < 1e-8 and widths[nearer == 0].max() < 7e-8
    assert (widths[nearer > 0] <= nearer[nearer > 0] / 8).all()
    assert EDGES[(EDGES >= 1) & (EDGES <= 2)].tolist() == [1 + i / 8 for i in range(9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("tokens", "num_experts"), [(1, 1), (7, 3), (50, 5)])
def test_counts_against_a_plain_search(tokens, num_experts, dtype):
    values = normal(tokens, num_experts, dtype=dtype) * torch.logspace(-8, 3, num_experts, dtype=dtype)
    values[: tokens // 2] = values[: tokens // 2].sign() * EDGES[256 + torch.arange(tokens // 2) * 7, None].to(dtype)
    mask = torch.arange(tokens) % 3 != 1
    expected = torch.zeros(num_experts, BINS, dtype=torch.int64)
    for row, real in zip(values.float().tolist(), mask.tolist(), strict=True):
        for expert, value in enumerate(row):
            expected[expert, bin_of(value)] += real
    found = histogram(values, mask)
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)


def test_values_beyond_the_limits_count_in_the_outermost_bins():
    counts = histogram(torch.tensor([[-1e30], [-256.0], [1e30], [math.inf]]))
    assert counts[0, 0] == 2 and counts[0, -1] == 2
    assert histogram(torch.tensor([[0.0], [-0.0], [1e-40], [5e-8]]))[0, BINS // 2] == 4


@pytest.mark.parametrize(("numerator", "denominator"), [(1, 8), (2, 16), (3, 7), (8, 256), (1, 2), (7, 8), (1, 1)])
@pytest.mark.parametrize("tokens", [1, 2, 5, 64, 999])
def test_the_quantile_lies_in_the_bin_of_the_sorted_value(tokens, numerator, denominator):
    values = normal(tokens, 4, seed=tokens) + torch.tensor([0.0, -3.0, 40.0, 1e-4])
    found = quantile(histogram(values), numerator, denominator)
    rank = -(-numerator * tokens // denominator)  # ⌈q·n⌉
    exact = values.sort(0).values[rank - 1]
    for mine, true in zip(found.tolist(), exact.tolist(), strict=True):
        index = bin_of(true)
        assert EDGES[index] <= mine <= EDGES[index + 1]


def test_the_quantile_of_many_values_is_torchs_within_a_bin():
    values = normal(20000, 3) * torch.tensor([1.0, 0.01, 5.0], dtype=torch.float64)
    for q in (1 / 32, 1 / 4, 0.9):
        found = quantile(histogram(values), round(q * 320), 320)
        exact = values.quantile(q, dim=0)
        torch.testing.assert_close(found, exact, rtol=0.01, atol=1e-5)


def test_a_quantile_worked_by_hand():
    # Three of four values are below 4; the wanted mass, 3.2 of 4, lies 0.2 of the way into 4's bin, from 4 to 4.5.
    assert quantile(histogram(torch.tensor([[1.0], [2.0], [3.0], [4.0]])), 4, 5).item() == pytest.approx(4.1)
    # Three of four are at most −2; 2.5 of 4 lies half way into the bin of −2, from −2.25.
    assert quantile(histogram(torch.tensor([[-4.0], [-3.0], [-2.0], [4.0]])), 5, 8).item() == pytest.approx(-2.125)


def test_nothing_counted_is_0_and_so_is_a_batch_of_padding():
    assert quantile(torch.zeros(3, BINS, dtype=torch.int64), 1, 2).tolist() == [0.0] * 3
    assert histogram(normal(4, 3), torch.zeros(4, dtype=torch.bool)).sum() == 0
    assert histogram(normal(4, 3)[:0]).sum() == 0


def test_parts_add_up_to_the_whole_and_chunks_change_nothing(monkeypatch):
    values, mask = normal(100, 6, dtype=torch.float32), torch.arange(100) % 4 != 0
    whole = histogram(values, mask)
    parts = sum(histogram(v, m) for v, m in zip(values.split([1, 60, 39]), mask.split([1, 60, 39]), strict=True))
    assert torch.equal(whole, parts)
    monkeypatch.setattr(module, "CHUNK", 7)
    assert torch.equal(whole, histogram(values, mask))


def test_integers_decide_beyond_what_fp32_can_count():
    counts = torch.zeros(1, BINS, dtype=torch.int64)
    counts[0, 10], counts[0, 400] = 2**40, 2**40 + 2  # one more than half stands in the upper bin
    assert EDGES[400] <= quantile(counts, 1, 2).item() <= EDGES[401]
    counts[0, 10] += 4
    assert EDGES[10] <= quantile(counts, 1, 2).item() <= EDGES[11]
