"""The integer bookkeeping of dispatch: sorted pairs, places, capacity."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from himoe.functional import reference
from himoe.functional.dispatch import ORDERS, capacity, place_in_expert, sort_by_expert

SHAPES = st.tuples(st.integers(0, 12), st.integers(1, 4), st.integers(1, 6), st.integers(0, 1000))


def random_pairs(tokens, k, num_experts, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(num_experts, (tokens, k), generator=generator)
    chosen = torch.rand(tokens, k, generator=generator) < (seed % 5) / 4  # from none to all
    return ids, chosen


@settings(max_examples=40, deadline=None)
@given(SHAPES)
def test_sorted_pairs(shape):
    num_experts = shape[2]
    ids, kept = random_pairs(*shape)
    rows = sort_by_expert(ids, kept, num_experts)
    pairs = rows.pair_of_row.tolist()
    assert sorted(pairs) == list(range(ids.numel()))
    assert rows.pair_of_row[rows.row_of_pair].tolist() == list(range(ids.numel()))
    assert rows.offsets.dtype == torch.int32 and rows.offsets.shape == (num_experts,)
    flat_ids, flat_kept, start = ids.flatten().tolist(), kept.flatten().tolist(), 0
    for e, end in enumerate(rows.offsets.tolist()):
        assert pairs[start:end] == [
            i for i, (j, ok) in enumerate(zip(flat_ids, flat_kept, strict=True)) if ok and j == e
        ]
        start = end
    assert start == kept.sum()
    assert not any(flat_kept[pair] for pair in pairs[start:])


@pytest.mark.parametrize("order", ORDERS)
@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, places=st.integers(0, 6))
def test_places_are_handed_out_as_in_the_reference(order, shape, places):
    ids, selected = random_pairs(*shape)
    weights = torch.randint(4, ids.shape, generator=torch.Generator().manual_seed(shape[3])) / 4  # many ties
    place = place_in_expert(ids, selected, weights, shape[2], order)
    expected = reference.keep_within_capacity(ids, selected, weights, places, order)
    assert torch.equal(selected & (place < places), expected)
    assert (place[~selected] >= selected.sum()).all()


@pytest.mark.parametrize(
    ("order", "places"),
    [
        # expert 0 stands in pairs (0, 0) .3, (1, 1) .4, (2, 0) .9; expert 1 in (0, 1) .2, (1, 0) .6, (2, 1) .1
        ("token_major", [[0, 0], [1, 1], [2, 2]]),
        ("column_major", [[0, 1], [0, 2], [1, 2]]),
        ("score", [[2, 1], [0, 1], [0, 2]]),
        ("batch_prioritised", [[1, 2], [0, 2], [0, 1]]),  # tokens 2, 1, 0; first all first choices
    ],
)
def test_places_by_hand(order, places):
    ids = torch.tensor([[0, 1], [1, 0], [0, 1]])
    weights = torch.tensor([[0.3, 0.2], [0.6, 0.4], [0.9, 0.1]])
    everyone = torch.ones_like(ids, dtype=torch.bool)
    assert place_in_expert(ids, everyone, weights, 2, order).tolist() == places


@pytest.mark.parametrize("order", ORDERS)
def test_equal_weights_go_token_by_token(order):
    ids, everyone = torch.zeros(50, 1, dtype=torch.int64), torch.ones(50, 1, dtype=torch.bool)
    assert place_in_expert(ids, everyone, torch.full((50, 1), 0.5), 3, order)[:, 0].tolist() == list(range(50))


@pytest.mark.parametrize("order", ORDERS)
def test_who_is_not_selected_stands_in_no_queue_whatever_its_weight(order):
    ids = torch.tensor([[0, 0], [0, 0], [0, 0]])
    selected = torch.tensor([[False, True], [True, False], [False, False]])
    for unused in (0.0, 9.0, torch.nan):
        weights = torch.tensor([[unused, 0.2], [0.1, unused], [unused, unused]])
        place = place_in_expert(ids, selected, weights, 1, order)
        first = [[6, 1], [0, 6], [6, 6]] if order == "column_major" else [[6, 0], [1, 6], [6, 6]]
        if order == "batch_prioritised":  # token 0 comes first, but its choice stands in the second column
            first = [[6, 1], [0, 6], [6, 6]]
        assert place.tolist() == first


@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k", "factor", "multiple", "places"),
    [
        (16, 8, 2, 1.0, 1, 4),
        (16, 8, 2, 1.25, 1, 5),
        (17, 8, 2, 1.25, 1, 5),  # 5.3125 rounds down
        (16, 8, 2, 1.25, 2, 6),  # then up to even
        (3, 8, 1, 1.0, 1, 1),  # never less than one place
        (3, 8, 1, 1.0, 2, 1),  # 0 is even already
        (0, 8, 2, 1.0, 1, 1),
        (10, 1, 1, 1.1, 1, 11),
        (100, 1, 1, 0.29, 1, 29),  # 100·0.29 is 28.999… in floating point
        (3, 1, 1, 1.1, 8, 8),
    ],
)
def test_capacity_by_hand(tokens, num_experts, top_k, factor, multiple, places):
    for given_tokens in (tokens, torch.tensor(tokens)):
        assert capacity(given_tokens, num_experts, top_k, factor, multiple).item() == places


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5000), st.integers(1, 256), st.integers(1, 8), st.integers(1, 400), st.integers(1, 8))
def test_capacity_is_the_floor_of_the_decimal_product(tokens, num_experts, top_k, hundredths, multiple):
    exact = math.floor(Fraction(hundredths, 100) * top_k * tokens / num_experts)
    expected = max(1, math.ceil(exact / multiple) * multiple)
    assert capacity(tokens, num_experts, top_k, hundredths / 100, multiple).item() == expected


@pytest.mark.parametrize("factor", [1e30, math.inf])
def test_a_factor_without_limit_gives_places_without_limit(factor):
    assert capacity(1000, 8, 2, factor).item() > 1000 * 2
