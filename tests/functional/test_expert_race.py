"""The best pairs of the whole batch: by hand, by loops, and the suite with its options."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from himoe.errors import ConfigError
from himoe.functional.selection.expert_race import expert_race
from himoe.functional.selection.top_k import top_k
from himoe.testing import check_selector
from himoe.types import RouterContext

TRAINING = RouterContext(training=True)


def by_loops(scores, mask, k, max_k):
    """Each token's experts, best first: pairs of real tokens in order of their score, until there are k a token."""
    real = [t for t in range(len(scores)) if mask[t]]
    pairs = sorted(((scores[t, e].item(), t, e) for t in real for e in range(scores.shape[1])), reverse=True)
    found = [[] for _ in mask]
    for _, t, e in pairs[: k * len(real)]:
        found[t].append(e)
    return [mine[:max_k] for mine in found]


def chosen(selection):
    return [ids[kept].tolist() for ids, kept in zip(*selection, strict=True)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.integers(1, 7), st.integers(0, 99), st.booleans(), st.data())
def test_it_is_the_loop(tokens, num_experts, seed, padded, data):
    k, max_k = (data.draw(st.integers(1, num_experts)) for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, num_experts, generator=generator, dtype=torch.float64)  # no two are alike
    mask = torch.rand(tokens, generator=generator) < 0.7 if padded else torch.ones(tokens, dtype=torch.bool)
    context = RouterContext(training=True, mask=mask if padded else None)
    assert chosen(expert_race(scores, context, k=k, max_k=max_k)) == by_loops(scores, mask, k, max_k)


def test_by_hand():
    scores = torch.tensor([[0.9, 0.8, 0.7], [0.1, 0.6, 0.3], [0.2, 0.4, 0.5]])
    assert chosen(expert_race(scores, TRAINING, k=1)) == [[0, 1, 2], [], []]  # the three best pairs are one token's
    assert chosen(expert_race(scores, TRAINING, k=2)) == [[0, 1, 2], [1], [2, 1]]
    assert chosen(expert_race(scores, TRAINING, k=1, max_k=1)) == [[0], [], []]  # what it loses goes to nobody
    padded = RouterContext(training=True, mask=torch.tensor([False, True, True]))
    assert chosen(expert_race(scores, padded, k=1)) == [[], [1], [2]]


def test_eval_is_plain_top_k():
    scores = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    assert chosen(expert_race(scores, RouterContext(), k=2)) == chosen(top_k(scores, RouterContext(), k=2))


@pytest.mark.parametrize("options", [{"k": 3, "max_k": 4}, {"k": 8}], ids=str)
def test_its_options_conform(options):
    check_selector(partial(expert_race, **options))


@pytest.mark.parametrize(
    ("options", "message"), [({"k": 4}, "top_k = 4"), ({"k": 0}, "top_k = 0"), ({"k": 1, "max_k": 4}, "max_k = 4")]
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        expert_race(torch.ones(2, 3), TRAINING, **options)
