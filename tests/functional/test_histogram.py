"""Quantiles from integer histograms: against sorted values, and sums that do not depend on how tokens are split."""

import math

import pytest
import torch

from himoe.functional import histogram as module
from himoe.functional.histogram import BINS, LIMIT, edges, histogram, quantile

EDGES = edges(torch.device("cpu"))


def bin_of(value: float) -> int:
    """The bin of a value by a plain search: edge_i < value ≤ edge_{i+1}, the outermost ones open."""
    inner = EDGES[1:-1].tolist()
    return sum(edge < value for edge in inner)


def normal(tokens: int, num_experts: int, seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, num_experts, generator=generator, dtype=torch.float64).to(dtype)


def test_the_edges_rise_are_symmetric_and_finest_at_0():
    assert EDGES.shape == (BINS + 1,) and (EDGES.diff() > 0).all()
    torch.testing.assert_close(EDGES, -EDGES.flip(0))
    assert EDGES[-1].item() == pytest.approx(LIMIT) and EDGES[BINS // 2].item() == 0
    widths = EDGES.diff()
    assert widths.min() < 1e-6
    far = EDGES[1:-1].abs() > 1e-3
    assert (widths[1:][far] < 0.07 * EDGES[2:].abs().maximum(EDGES[1:-1].abs())[far]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("tokens", "num_experts"), [(1, 1), (7, 3), (50, 5)])
def test_counts_against_a_plain_search(tokens, num_experts, dtype):
    values = normal(tokens, num_experts, dtype=dtype) * torch.logspace(-6, 3, num_experts, dtype=dtype)
    mask = torch.arange(tokens) % 3 != 1
    expected = torch.zeros(num_experts, BINS, dtype=torch.int64)
    for row, real in zip(values.double().tolist(), mask.tolist(), strict=True):
        for expert, value in enumerate(row):
            expected[expert, bin_of(value)] += real
    found = histogram(values, mask)
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)


def test_values_beyond_the_limits_count_in_the_outermost_bins():
    counts = histogram(torch.tensor([[-1e30], [-81.0], [1e30], [math.inf]]))
    assert counts[0, 0] == 2 and counts[0, -1] == 2


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
    # Three of four values are ≤ 3; the wanted mass, 3.2 of 4, lies 0.2 of the way into the bin that holds 4.
    values = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    index = bin_of(4.0)
    lower, upper = EDGES[index].item(), EDGES[index + 1].item()
    assert quantile(histogram(values), 4, 5).item() == pytest.approx(lower + 0.2 * (upper - lower))


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
