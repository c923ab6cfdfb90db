"""Rounding every expert's token count to whole tiles: by hand, by loops, and what must not change."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from himoe.errors import ConfigError
from himoe.functional import reference
from himoe.functional.selection import top_k, top_k_in_tiles
from himoe.functional.stats import count_pairs
from himoe.testing import check_selector
from himoe.types import RouterContext

TRAINING = RouterContext(training=True)


def by_loops(scores, mask, k, tile):
    """Each expert's tokens, a set."""
    real = [t for t in range(len(scores)) if mask[t]]
    chosen = reference.top_k(scores, k)
    found = []
    for e in range(scores.shape[1]):
        score = scores[:, e].tolist()
        mine = sorted((t for t in real if e in chosen[t]), key=lambda t, s=score: -s[t])
        others = sorted((t for t in real if e not in chosen[t]), key=lambda t, s=score: -s[t])
        count = len(mine)
        if mine and len(real) >= tile:
            count = min(max((len(mine) + tile // 2) // tile * tile, tile), len(real))
        found.append(set((mine + others)[:count]))
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99), st.booleans(), st.data())
def test_it_is_the_loop(tokens, num_experts, tile, seed, padded, data):
    k = data.draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.randn(tokens, num_experts, generator=generator) + torch.linspace(0, 2, num_experts)).softmax(-1)
    mask = torch.rand(tokens, generator=generator) < 0.7 if padded else torch.ones(tokens, dtype=torch.bool)
    context = RouterContext(training=True, mask=mask if padded else None)
    ids, selected = top_k_in_tiles(scores, context, k=k, tile=tile)
    found = [set(((ids == e) & selected).any(-1).nonzero().flatten().tolist()) for e in range(num_experts)]
    assert found == by_loops(scores, mask, k, tile)


def test_by_hand():
    # Expert 0 is chosen by 5 tokens, expert 1 by 3: tiles of 4 make both 4, so token 4, 0's weakest, goes to 1 as well.
    scores = torch.tensor(
        [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.65, 0.35], [0.55, 0.45], [0.4, 0.6], [0.3, 0.7], [0, 1]]
    )
    ids, selected = top_k_in_tiles(scores, TRAINING, k=1, tile=4)
    assert [ids[t][selected[t]].tolist() for t in range(8)] == [[0]] * 4 + [[1]] * 4
    ids, selected = top_k_in_tiles(scores, TRAINING, k=1, tile=3)  # 5 is nearer to 6, 3 stays
    assert [ids[t][selected[t]].tolist() for t in range(8)] == [[0]] * 5 + [[1, 0], [1], [1]]


def test_counts_are_whole_tiles_and_most_choices_stay():
    scores = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)).softmax(-1)
    ids, selected = top_k_in_tiles(scores, TRAINING, k=4, tile=32, max_k=8)
    counts, plain = count_pairs(ids, selected, 16), count_pairs(*top_k(scores, TRAINING, k=4), 16)
    assert (counts % 32 == 0).all() and ((counts - plain).abs() <= 16).all()


def test_eval_and_small_batches_are_plain_top_k():
    scores = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for context, tile in ((RouterContext(training=False), 4), (TRAINING, 21)):
        ids, selected = top_k_in_tiles(scores, context, k=2, tile=tile)
        expected, _ = top_k(scores, context, k=2)
        assert torch.equal(ids[:, :2], expected) and selected[:, :2].all() and not selected[:, 2:].any()
    assert top_k_in_tiles.causal is False and "later tokens" in top_k_in_tiles.causal_reason


@pytest.mark.parametrize("options", [{"k": 2, "tile": 4}, {"k": 3, "tile": 8, "max_k": 3}], ids=str)
def test_its_options_conform(options):
    check_selector(partial(top_k_in_tiles, **options))


def test_what_cannot_be_is_refused():
    for options, message in (({"tile": 0}, "tile = 0 must be at least 1"), ({"max_k": 7}, "max_k = 7")):
        with pytest.raises(ConfigError, match=message):
            partial(top_k_in_tiles, k=2, **options)(torch.ones(2, 3), TRAINING)
