"""Counts and balance metrics against values worked by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_builder import make_routing
from torch.utils._python_dispatch import TorchDispatchMode

from himoe.functional import stats

LN2 = math.log(2)
UNEVEN = torch.tensor([3, 1, 1, 3])
ONE_TAKES_ALL = torch.tensor([8, 0, 0, 0])
EVEN = torch.tensor([2, 2, 2, 2])
NOTHING = torch.tensor([0, 0, 0, 0])


class LargestAllocation(TorchDispatchMode):
    """Remember the largest number of elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_counts_are_per_expert_and_only_of_what_counts():
    ids = torch.tensor([[0, 2], [2, 1], [2, 0]])
    counted = torch.tensor([[True, True], [True, False], [True, True]])
    counts = stats.count_pairs(ids, counted, 4)
    assert counts.tolist() == [2, 0, 3, 0] and counts.dtype == torch.int64


def test_counts_are_exact_above_2_to_the_24():
    pairs = 2**24 + 3
    ids = torch.zeros(1, 1, dtype=torch.int64).expand(pairs, 1)
    counted = torch.ones(1, 1, dtype=torch.bool).expand(pairs, 1)
    assert stats.count_pairs(ids, counted, 2).tolist() == [pairs, 0]


def test_load_is_kept_and_selected_load_is_before_drops():
    selected = [[True, True], [True, False], [True, True]]
    kept = [[True, False], [True, False], [False, True]]
    routing = make_routing(torch.zeros(3, 4), [[0, 2], [2, 1], [2, 0]], selected=selected, kept=kept)
    assert stats.selected_load(routing).tolist() == [2, 0, 3, 0]
    assert stats.load(routing).tolist() == [2, 0, 1, 0]
    assert stats.drop_rate(routing).item() == pytest.approx(2 / 5)


def test_nothing_selected_is_nothing_dropped():
    routing = make_routing(torch.zeros(2, 4), [[0], [1]], mask=[False, False])
    assert stats.drop_rate(routing).item() == 0


@pytest.mark.parametrize("statistic", [stats.load, stats.selected_load, stats.drop_rate])
def test_counting_needs_no_one_hot(statistic):
    tokens, k, num_experts = 1000, 4, 300
    ids = torch.randint(num_experts, (tokens, k), generator=torch.Generator().manual_seed(0))
    routing = make_routing(torch.zeros(1, num_experts).expand(tokens, -1), ids)
    with LargestAllocation() as largest:
        statistic(routing)
    assert 0 < largest.numel <= tokens * k


# shares of [3, 1, 1, 3]: 3/8, 1/8, 1/8, 3/8 · entropy 3 ln 2 − 3/4·ln 3
UNEVEN_ENTROPY = 3 * LN2 - 3 / 4 * math.log(3)


@pytest.mark.parametrize(
    ("metric", "uneven", "one_takes_all", "even"),
    [
        (stats.imbalance, 1.5, 4.0, 1.0),
        (stats.max_vio, 0.5, 3.0, 0.0),
        (stats.coefficient_of_variation, 0.5, math.sqrt(3), 0.0),
        (stats.effective_experts, math.exp(UNEVEN_ENTROPY), 1.0, 4.0),
        (stats.normalized_entropy, UNEVEN_ENTROPY / math.log(4), 0.0, 1.0),
        (stats.dead_experts, 0, 3, 0),
    ],
)
def test_metrics_by_hand(metric, uneven, one_takes_all, even):
    expected = [uneven, one_takes_all, even, even]  # no load at all counts as even
    loads = torch.stack([UNEVEN, ONE_TAKES_ALL, EVEN, NOTHING])
    for scale in (1, 7, 0.25):
        assert metric(loads * scale).tolist() == pytest.approx(expected, abs=1e-12)
    for load, value in zip(loads, expected, strict=True):
        assert metric(load).item() == pytest.approx(value, abs=1e-12)
        assert metric(load).shape == ()


def test_metrics_of_a_single_expert():
    load = torch.tensor([5])
    assert stats.max_vio(load).item() == 0
    assert stats.coefficient_of_variation(load).item() == 0
    assert stats.normalized_entropy(load).item() == 1
    assert stats.effective_experts(load).item() == pytest.approx(1)


def test_metrics_of_loads_beyond_fp32():
    load = torch.tensor([2**40 + 2**12, 2**40, 2**40, 2**40 - 2**12])
    assert stats.max_vio(load).item() == pytest.approx(2**-28, rel=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=9).filter(any))
def test_cv_squared_is_n_times_the_squared_norm_of_the_shares_minus_1(load):
    load = torch.tensor(load)
    shares = load.double() / load.sum()
    by_hand = len(load) * (shares**2).sum() - 1
    assert stats.coefficient_of_variation(load).square().item() == pytest.approx(by_hand.item(), abs=1e-9)


def test_an_expert_is_dead_under_one_percent_of_the_fair_share():
    # of 4000 pairs the fair share is 1000, one percent of it 10
    load = torch.tensor([[1330, 1330, 1330, 10], [1330, 1330, 1331, 9], [2000, 2000, 0, 0]])
    assert stats.dead_experts(load).tolist() == [0, 1, 2]
    assert stats.dead_experts(load, threshold=0.5).tolist() == [1, 1, 2]


def test_straggler_is_the_fullest_device():
    load = torch.tensor([[5, 1, 1, 1], [3, 1, 1, 3], [8, 0, 0, 0]])
    assert stats.straggler(load, 2).tolist() == [1.5, 1.0, 2.0]
    assert stats.straggler(load, 4).tolist() == stats.imbalance(load).tolist()
    assert stats.straggler(load, 1).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("padding", [False, True])
def test_facts_about_the_gate_by_hand(padding):
    # p₁ = (1/2, 1/4, 1/8, 1/8), p₂ uniform
    logits = torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 8], [1 / 4] * 4], dtype=torch.float64).log() + 3
    mask = None
    if padding:
        logits, mask = torch.cat([logits, torch.tensor([[9.0, 0.0, 0.0, 0.0]])]), [True, True, False]
    routing = make_routing(logits, [[0]] * len(logits), mask=mask)
    assert stats.router_entropy(routing).item() == pytest.approx((7 / 4 + 2) / 2 * LN2)
    assert stats.top1_probability(routing).item() == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert stats.margin(routing).item() == pytest.approx((1 / 4 + 0) / 2)
