"""Scores against their definitions, selectors against the sorted-list reference."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from himoe.errors import ConfigError
from himoe.functional import reference
from himoe.functional.groups import Groups
from himoe.functional.scores import sigmoid, softmax
from himoe.functional.selection import top_k, top_k_per_group
from himoe.types import RouterContext

CONTEXT = RouterContext()


def distinct_scores(tokens, num_experts, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(num_experts, generator=generator) for _ in range(tokens)]
    return torch.stack(rows).float() / num_experts - 0.3 if rows else torch.zeros(0, num_experts)


@st.composite
def partitions(draw):
    """Groups of any size in any order."""
    num_experts = draw(st.integers(1, 10))
    experts = draw(st.permutations(range(num_experts)))
    cuts = sorted(draw(st.sets(st.integers(1, num_experts - 1)))) if num_experts > 1 else []
    edges = [0, *cuts, num_experts]
    return [list(experts[a:b]) for a, b in itertools.pairwise(edges)]


def test_softmax_is_one_distribution_over_all_experts():
    logits = torch.tensor([[0.0, 1.0, 2.0], [5.0, 5.0, 5.0]], dtype=torch.float64)
    by_hand = torch.stack([row.exp() / row.exp().sum() for row in logits])
    torch.testing.assert_close(softmax(logits), by_hand)
    assert softmax(torch.tensor([[1e4, 0.0]])).tolist() == [[1.0, 0.0]]


def test_sigmoid_scores_every_expert_alone():
    logits = torch.tensor([[0.0, 1.0, -2.0]], dtype=torch.float64)
    torch.testing.assert_close(sigmoid(logits), 1 / (1 + (-logits).exp()))
    assert sigmoid(torch.tensor([[0.0, 1e4]])).tolist() == [[0.5, 1.0]]


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(0, 5), st.integers(1, 9), st.integers(0, 1000))
def test_top_k_is_the_reference(data, tokens, num_experts, seed):
    scores = distinct_scores(tokens, num_experts, seed)
    k = data.draw(st.integers(1, num_experts))
    expert_ids, selected = top_k(scores, CONTEXT, k=k)
    assert expert_ids.tolist() == reference.top_k(scores, k)
    assert selected.shape == (tokens, k) and selected.all()


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(1, 5), st.sampled_from([(1, 1), (2, 3), (4, 2), (3, 1)]), st.integers(0, 1000))
def test_equal_groups_give_their_k_best_each(data, tokens, shape, seed):
    num_groups, size = shape
    groups = Groups.equal(num_groups * size, num_groups)
    k = data.draw(st.integers(1, size))
    scores = distinct_scores(tokens, groups.num_experts, seed)
    expected = reference.top_k_per_group(scores, [list(g) for g in groups.members], [k] * num_groups)
    for given_k in (k, (k,) * num_groups):
        expert_ids, selected = top_k_per_group(scores, CONTEXT, groups=groups, k=given_k)
        assert expert_ids.tolist() == expected
        assert selected.shape == (tokens, num_groups * k) and selected.all()


@settings(max_examples=40, deadline=None)
@given(st.data(), partitions(), st.integers(1, 5), st.integers(0, 1000))
def test_explicit_groups_with_a_k_each(data, members, tokens, seed):
    groups = Groups(members)
    k = [data.draw(st.integers(1, len(group))) for group in members]
    scores = distinct_scores(tokens, groups.num_experts, seed)
    expert_ids, selected = top_k_per_group(scores, CONTEXT, groups=groups, k=tuple(k))
    assert expert_ids.tolist() == reference.top_k_per_group(scores, members, k)
    assert selected.shape == (tokens, sum(k)) and selected.all()


def test_every_group_serves_every_token_equally_often():
    scores = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    expert_ids, _ = top_k_per_group(scores, CONTEXT, groups=Groups.equal(12, 4), k=2)
    assert torch.bincount(expert_ids.flatten() // 3).tolist() == [100, 100, 100, 100]


@pytest.mark.parametrize("k", [(1, 1), (1, 1, 1, 1, 1), 3, (1, 1, 1, 3)])
def test_a_k_that_does_not_fit_the_groups_is_refused(k):
    with pytest.raises(ConfigError, match=r"top_k_per_group: k = .* sizes \(2, 2, 2, 2\)"):
        top_k_per_group(torch.randn(3, 8), CONTEXT, groups=Groups.equal(8, 4), k=k)
