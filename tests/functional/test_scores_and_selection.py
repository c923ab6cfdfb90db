"""Scores against their definitions, selectors against the sorted-list reference."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from himoe.errors import ConfigError
from himoe.functional import losses, reference
from himoe.functional.groups import Groups
from himoe.functional.scores import (
    relu,
    sigmoid,
    softmax,
    softmax_over_selected,
    softmax_per_group,
    sqrt_softplus,
)
from himoe.functional.selection import threshold, top_k, top_k_per_group
from himoe.nn import Router
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


def test_sqrt_softplus_is_its_formula_with_its_gradient():
    logits = torch.tensor([[0.0, 1.0, -2.0, -30.0, 40.0]], dtype=torch.float64, requires_grad=True)
    expected = [math.sqrt(math.log1p(math.exp(x))) for x in (0, 1, -2, -30, 40)]
    torch.testing.assert_close(sqrt_softplus(logits)[0].tolist(), expected)
    assert torch.autograd.gradcheck(sqrt_softplus, logits)


def test_sqrt_softplus_stays_positive_with_a_finite_gradient_for_any_logit():
    logits = torch.tensor([[-1e4, -200.0, -100.0, 0.0, 1e4]], requires_grad=True)
    scores = sqrt_softplus(logits)
    scores.sum().backward()
    assert (scores > 0).all() and scores.isfinite().all() and logits.grad.isfinite().all()


def test_relu_scores_are_the_positive_logits():
    assert relu(torch.tensor([[-1.0, 0.0, 2.5]])).tolist() == [[0.0, 0.0, 2.5]]


def test_softmax_over_selected_renormalised_is_the_softmax_of_the_selected_logits():
    logits = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(20, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expert_ids, _ = top_k(logits.detach(), CONTEXT, k=2)
    chosen = softmax_over_selected(logits).gather(-1, expert_ids)
    weights = chosen / chosen.sum(-1, keepdim=True)
    expected = logits.gather(-1, expert_ids).softmax(-1)
    torch.testing.assert_close(weights, expected)
    grads = [torch.autograd.grad(value, logits, upstream)[0] for value in (weights, expected)]
    torch.testing.assert_close(*grads)
    assert softmax_over_selected(torch.tensor([[1e4, 1e4 - 1, -1e4]])).tolist()[0][::2] == [1.0, 0.0]


@pytest.mark.parametrize("k", [1, (2, 1, 1)])
def test_softmax_per_group_by_loops(k):
    members = [[0, 3, 5], [1], [2, 4]]
    logits = torch.randn(7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    each = (1, 1, 1) if k == 1 else k
    expected = torch.zeros_like(logits)
    for t in range(7):
        for group, k_g in zip(members, each, strict=True):
            total = sum(math.exp(logits[t, e]) for e in group)
            for e in group:
                expected[t, e] = math.exp(logits[t, e]) / total * k_g / sum(each)
    torch.testing.assert_close(softmax_per_group(logits, groups=Groups(members), k=k), expected)
    torch.testing.assert_close(expected.sum(-1), torch.ones(7, dtype=torch.float64))


def test_softmax_per_group_is_a_router_per_pool():
    """Equal to two layers with a gate each and output (k₁·o₁ + k₂·o₂)/(k₁ + k₂), gradients of the gate included."""
    pools, each = Groups(((0, 1, 2, 3), (4, 5, 6, 7, 8, 9))), (1, 2)
    gate = torch.randn(10, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs = torch.randn(12, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)  # of every expert
    logits = x @ gate.T
    scores = softmax_per_group(logits, groups=pools, k=each)
    expert_ids, _ = top_k_per_group(scores.detach(), CONTEXT, groups=pools, k=each)
    together = (scores.gather(-1, expert_ids) * outputs.gather(-1, expert_ids)).sum(-1)
    alone = []
    for first, size, k in ((0, 4, 1), (4, 6, 2)):
        own = (x @ gate[first : first + size].T).softmax(-1)
        ids, _ = top_k(own.detach(), CONTEXT, k=k)
        alone.append((own.gather(-1, ids) * outputs[:, first : first + size].gather(-1, ids)).sum(-1))
    expected = (1 * alone[0] + 2 * alone[1]) / 3
    torch.testing.assert_close(together, expected)
    grads = [torch.autograd.grad(value.sum(), gate, retain_graph=True)[0] for value in (together, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("k", [0, (1, 0), (1, 5), (1, 1, 1)])
def test_softmax_per_group_refuses_a_k_that_does_not_fit(k):
    with pytest.raises(ConfigError, match=r"softmax_per_group: k = .* sizes \(4, 4\)"):
        softmax_per_group(torch.zeros(2, 8), groups=Groups.equal(8, 2), k=k)


@pytest.mark.parametrize("renormalize", [True, False])
def test_a_row_without_a_positive_logit_keeps_relu_routing_and_losses_finite(renormalize):
    class Logits(torch.nn.Module):
        def forward(self, x):
            return x

    router = Router(Logits(), threshold, num_experts=4, score=relu, renormalize=renormalize)
    x = torch.tensor(
        [[-1.0, -2.0, -3.0, -4.0], [0.0, 0.0, 0.0, 0.0], [1e-30, -1.0, 2e-12, -1.0], [3.0, 1.0, -1.0, 0.5]]
    )
    routing = router(x.requires_grad_())
    assert routing.selected.sum(-1).tolist() == [0, 0, 2, 3]
    assert (routing.weights[:2] == 0).all()
    log_p = losses.log_probabilities(routing, "corrected")
    torch.testing.assert_close(log_p[0].exp(), torch.full((4,), 0.25))
    loss = routing.weights.square().sum() + losses.load_balance(routing) + (log_p.exp() * log_p).sum()
    loss.backward()
    assert log_p.isfinite().all() and loss.isfinite() and x.grad.isfinite().all()
    assert (x.grad[:2] == 0).all() and x.grad[3].abs().sum() > 0


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


@pytest.mark.parametrize("k", [(1, 1), (1, 1, 1, 1, 1), 3, (1, 1, 1, 3), 0, -1, (1, 0, 1, 1)])
def test_a_k_that_does_not_fit_the_groups_is_refused(k):
    with pytest.raises(ConfigError, match=r"top_k_per_group: k = .* sizes \(2, 2, 2, 2\)"):
        top_k_per_group(torch.randn(3, 8), CONTEXT, groups=Groups.equal(8, 4), k=k)


@pytest.mark.parametrize("k", [(2, 0), (0, 3), (2, -1), 0])
def test_no_unequal_group_goes_without_an_expert(k):
    with pytest.raises(ConfigError, match=r"a number between 1 and its size, sizes \(2, 6\)$"):
        top_k_per_group(torch.randn(3, 8), CONTEXT, groups=Groups(((0, 1), (2, 3, 4, 5, 6, 7))), k=k)
