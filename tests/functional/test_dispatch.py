"""The integer bookkeeping of dispatch: sorted pairs, places, capacity."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from himoe.functional import reference
from himoe.functional.dispatch import capacity, place_in_expert, sort_by_expert

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


@pytest.mark.parametrize("order", ["token_major", "column_major"])
@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, places=st.integers(0, 6))
def test_places_are_handed_out_as_in_the_reference(order, shape, places):
    ids, selected = random_pairs(*shape)
    place = place_in_expert(ids, selected, shape[2], order)
    expected = reference.keep_within_capacity(ids, selected, places, order)
    assert torch.equal(selected & (place < places), expected)
    assert (place[~selected] >= selected.sum()).all()


def test_places_by_hand():
    ids = torch.tensor([[0, 1], [1, 0], [0, 1]])
    everyone = torch.ones_like(ids, dtype=torch.bool)
    # token by token, expert 0 sees pairs (0,0) (1,1) (2,0); column by column (0,0) (2,0) (1,1)
    assert place_in_expert(ids, everyone, 2, "token_major").tolist() == [[0, 0], [1, 1], [2, 2]]
    assert place_in_expert(ids, everyone, 2, "column_major").tolist() == [[0, 1], [0, 2], [1, 2]]


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
