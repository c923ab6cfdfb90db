"""Selectors beyond top_k: each against plain loops over odd shapes, and its options by hand."""

import inspect
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from himoe.errors import ConfigError
from himoe.functional.selection import (
    expert_choice,
    hash_tokens,
    replay,
    round_robin,
    sinkhorn,
    threshold,
    top_k,
    top_p,
)
from himoe.functional.stats import count_pairs, max_vio
from himoe.registry import SELECTORS, fact, having, load
from himoe.types import RouterContext

SHAPES = {"tokens": st.integers(0, 7), "num_experts": st.integers(1, 9), "seed": st.integers(0, 1000)}
QUICK = settings(max_examples=60, deadline=None)
NONE = RouterContext()


def scores_of(tokens, num_experts, seed):
    """Scores between 0 and 3 in fp64: no two are alike."""
    return 3 * torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask_of(tokens, seed):
    return torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.7


def chosen(selection):
    """The experts of each token, in order."""
    return [
        [e for e, s in zip(*row, strict=True) if s] for row in zip(*(part.tolist() for part in selection), strict=True)
    ]


def ranked(row):
    return sorted(range(len(row)), key=lambda e: -row[e])


def one(rows):
    return torch.tensor(rows, dtype=torch.float64)


# top_p


def top_p_by_loops(scores, p, max_k):
    result = []
    for row in scores.tolist():
        mine, held = [], 0.0
        for e in ranked(row):
            if len(mine) == max_k or (mine and held >= p * sum(row)):
                break
            mine.append(e)
            held += row[e]
        result.append(mine)
    return result


@QUICK
@given(data=st.data(), p=st.sampled_from([0.01, 0.3, 0.55, 0.9, 1.0]), **SHAPES)
def test_top_p_is_the_loop(data, p, tokens, num_experts, seed):
    scores = scores_of(tokens, num_experts, seed)
    max_k = data.draw(st.integers(1, num_experts))
    found = top_p(scores, NONE, p=p, max_k=max_k)
    assert chosen(found) == top_p_by_loops(scores, p, max_k)
    assert found[0].shape == found[1].shape == (tokens, max_k)
    everything = top_p.wanted(scores, NONE, p=p)
    assert [set(row.nonzero().flatten().tolist()) for row in everything] == [
        set(mine) for mine in top_p_by_loops(scores, p, num_experts)
    ]


def test_top_p_by_hand():
    rows = one([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0]])
    numbers = [len(row) for row in chosen(top_p(rows, NONE, p=0.75))]
    assert numbers == [2, 3, 1]  # a share that is reached exactly is enough
    assert [len(row) for row in chosen(top_p(rows, NONE, p=0.76))] == [3, 4, 1]
    assert [len(row) for row in chosen(top_p(rows, NONE, p=0.76, max_k=2))] == [2, 2, 1]
    assert chosen(top_p(rows * 8, NONE, p=0.75)) == chosen(top_p(rows, NONE, p=0.75))  # a share, whatever the sum


def test_top_p_counts_negative_scores_as_nothing_and_always_gives_one():
    assert chosen(top_p(one([[-1.0, 3.0, 1.0], [-3.0, -1.0, -2.0], [0.0, 0.0, 0.0]]), NONE, p=0.8))[:2] == [[1, 2], [1]]
    assert [len(row) for row in chosen(top_p(torch.zeros(2, 3), NONE, p=1.0))] == [1, 1]


@pytest.mark.parametrize("p", [0, -0.1, 1.1])
def test_top_p_refuses_a_share_that_is_none(p):
    with pytest.raises(ConfigError, match=rf"top_p: p = {p} must be above 0 and at most 1"):
        top_p(torch.ones(1, 2), NONE, p=p)


# threshold


@QUICK
@given(data=st.data(), limit=st.sampled_from([-1.0, 0.5, 1.2, 9.0]), **SHAPES)
def test_threshold_is_the_loop(data, limit, tokens, num_experts, seed):
    scores = scores_of(tokens, num_experts, seed)
    max_k = data.draw(st.integers(1, num_experts))
    expected = [[e for e in ranked(row) if row[e] > limit][:max_k] for row in scores.tolist()]
    assert chosen(threshold(scores, NONE, threshold=limit, max_k=max_k)) == expected


def test_relu_scores_use_the_positive_logits_and_nothing_else():
    logits = one([[1.0, -1.0, 0.0, 2.0], [-1.0, -2.0, -3.0, -4.0]])
    assert chosen(threshold(logits.relu(), NONE)) == [[3, 0], []]
    assert threshold(logits.relu(), NONE)[0].shape == (2, 4)


@pytest.mark.parametrize("selector", [top_p, threshold, partial(expert_choice, k=1)])
@pytest.mark.parametrize("max_k", [0, 4])
def test_a_max_k_out_of_range_is_refused(selector, max_k):
    with pytest.raises(ConfigError, match=rf"max_k = {max_k} must be between 1 and num_experts = 3"):
        selector(torch.ones(2, 3), NONE, max_k=max_k)


# expert_choice


def expert_choice_by_loops(scores, mask, k, factor, max_k):
    real = [t for t in range(len(scores)) if mask[t]]
    num_experts = scores.shape[1]
    each = min(max(math.floor(factor * k * len(real) / num_experts + 1e-9), 1), len(real))
    mine = {t: [] for t in range(len(scores))}
    for e in range(num_experts):
        for t in sorted(real, key=lambda t, e=e: -scores[t, e].item())[:each]:
            mine[t].append(e)
    return [sorted(mine[t], key=lambda e, t=t: -scores[t, e].item())[:max_k] for t in range(len(scores))]


@QUICK
@given(data=st.data(), factor=st.sampled_from([0.1, 0.5, 1.0, 1.25, 3.0, 100.0]), padded=st.booleans(), **SHAPES)
def test_expert_choice_is_the_loop(data, factor, padded, tokens, num_experts, seed):
    scores = scores_of(tokens, num_experts, seed)
    mask = mask_of(tokens, seed) if padded else torch.ones(tokens, dtype=torch.bool)
    k, max_k = data.draw(st.integers(1, num_experts)), data.draw(st.integers(1, num_experts))
    context = RouterContext(mask=mask if padded else None)
    found = expert_choice(scores, context, k=k, capacity_factor=factor, max_k=max_k)
    assert chosen(found) == expert_choice_by_loops(scores, mask, k, factor, max_k)


def test_every_expert_gets_the_same_and_more_per_token_means_more_tokens_per_expert():
    scores = (torch.randn(40, 8, generator=torch.Generator().manual_seed(0)) + torch.linspace(0, 9, 8)).softmax(-1)
    for k, factor, each in ((2, 1.0, 10), (1, 1.0, 5), (2, 1.5, 15), (8, 1.0, 40)):
        expert_ids, selected = expert_choice(scores, NONE, k=k, capacity_factor=factor)
        assert count_pairs(expert_ids, selected, 8).tolist() == [each] * 8
    mask = torch.arange(40) < 21
    expert_ids, selected = expert_choice(scores, RouterContext(mask=mask), k=2)
    assert count_pairs(expert_ids, selected, 8).tolist() == [5] * 8 and not selected[21:].any()


@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan])
def test_expert_choice_refuses_a_capacity_that_is_none(factor):
    with pytest.raises(ConfigError, match=r"capacity_factor = .* must be above 0 and finite"):
        expert_choice(torch.ones(2, 3), NONE, k=1, capacity_factor=factor)


# sinkhorn


def sinkhorn_by_loops(scores, mask, k, iterations):
    """Scale columns and rows of the scores themselves, one entry after another."""
    matrix = [list(row) for row in scores.tolist()]
    real = [t for t in range(len(matrix)) if mask[t]]
    experts = range(scores.shape[1])
    for turn in range(iterations):
        if turn:
            for row in matrix:
                total = sum(row)
                row[:] = [value / total for value in row]
        for e in experts:
            total = sum(matrix[t][e] for t in real) or 1.0
            for row in matrix:
                row[e] /= total
    return [ranked(row)[:k] for row in matrix]


@QUICK
@given(data=st.data(), iterations=st.integers(1, 4), padded=st.booleans(), **SHAPES)
def test_sinkhorn_is_the_loop(data, iterations, padded, tokens, num_experts, seed):
    scores = scores_of(tokens, num_experts, seed).softmax(-1)
    mask = mask_of(tokens, seed) if padded else torch.ones(tokens, dtype=torch.bool)
    k = data.draw(st.integers(1, num_experts))
    context = RouterContext(mask=mask if padded else None, training=True)
    found = chosen(sinkhorn(scores, context, k=k, iterations=iterations))
    expected = sinkhorn_by_loops(scores, mask, k, iterations)
    if mask.sum() > 1:  # a single real token makes a row of ones, where all tie
        assert [row for row, m in zip(found, mask, strict=True) if m] == [
            row for row, m in zip(expected, mask, strict=True) if m
        ]


def test_sinkhorn_does_not_care_for_a_factor_per_token_and_is_top_k_in_eval():
    logits = torch.randn(30, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    training = RouterContext(training=True)
    assert torch.equal(sinkhorn(logits.exp(), training, k=2)[0], sinkhorn(logits.softmax(-1), training, k=2)[0])
    assert torch.equal(sinkhorn(logits.exp(), NONE, k=2)[0], top_k(logits, NONE, k=2)[0])
    assert not torch.equal(sinkhorn(logits.exp(), training, k=2)[0], top_k(logits, NONE, k=2)[0])


def test_sinkhorn_survives_scores_that_underflow():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(2)) + torch.tensor([0.0, 200.0, 0.0, 0.0])
    expert_ids, selected = sinkhorn(logits.softmax(-1), RouterContext(training=True), k=1)
    assert selected.all() and expert_ids.min() >= 0 and expert_ids.max() < 4


def test_sinkhorn_refuses_no_iteration():
    with pytest.raises(ConfigError, match="sinkhorn: iterations = 0 must be at least 1"):
        sinkhorn(torch.ones(2, 3), NONE, k=1, iterations=0)


# hash


def hash_by_loops(token_ids, num_experts, k, seed):
    """Whole numbers without a limit, cut to 32 bits after every product."""

    def mix(word):
        word = ((word ^ (word >> 16)) * 0x21F0AAAD) % 2**32
        word = ((word ^ (word >> 15)) * 0x735A2D97) % 2**32
        return word ^ (word >> 15)

    result = []
    for token in token_ids:
        start, mine = mix(mix(token % 2**32) ^ (seed * 0x9E3779B9 % 2**32)), []
        for j in range(k):
            last = num_experts - k + j
            drawn = mix((start + (j + 1) * 0x9E3779B9) % 2**32) % (last + 1)
            mine.append(last if drawn in mine else drawn)
        result.append(mine)
    return result


@QUICK
@given(data=st.data(), hash_seed=st.integers(-5, 2**40), **SHAPES)
def test_hash_is_the_loop(data, hash_seed, tokens, num_experts, seed):
    token_ids = torch.randint(0, 200_000, (tokens,), generator=torch.Generator().manual_seed(seed))
    k = data.draw(st.integers(1, num_experts))
    context = RouterContext(token_ids=token_ids)
    found = chosen(hash_tokens(torch.zeros(tokens, num_experts), context, k=k, seed=hash_seed))
    assert found == hash_by_loops(token_ids.tolist(), num_experts, k, hash_seed)
    assert all(len(set(row)) == k for row in found)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_hash_spreads_the_vocabulary_evenly_over_experts_and_choices(k):
    context = RouterContext(token_ids=torch.arange(40_000))
    expert_ids, selected = hash_tokens(torch.zeros(40_000, 8), context, k=k)
    counts = count_pairs(expert_ids, selected, 8).double()
    expected = 40_000 * k / 8
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected)
    if k == 3:
        sets = (1 << expert_ids).sum(-1).unique(return_counts=True)[1].double()
        assert len(sets) == 56 and (sets - 40_000 / 56).abs().max() < 5 * math.sqrt(40_000 / 56)


def test_hash_gives_a_word_the_same_experts_everywhere_and_another_seed_gives_others():
    scores, ids = torch.zeros(6, 64), torch.tensor([5, 9, 5, 7, 9, 5])
    rows = hash_tokens(scores, RouterContext(token_ids=ids), k=4)[0]
    assert torch.equal(rows[0], rows[2]) and torch.equal(rows[0], rows[5]) and not torch.equal(rows[0], rows[1])
    assert not torch.equal(hash_tokens(scores, RouterContext(token_ids=ids), k=4, seed=1)[0], rows)


def test_hash_without_token_ids_says_what_to_do():
    with pytest.raises(ConfigError, match=r"hash: needs the tokens' ids.*MoE\(x, token_ids=…\)"):
        hash_tokens(torch.zeros(2, 4), NONE, k=1)


# round_robin


@QUICK
@given(data=st.data(), padded=st.booleans(), **SHAPES)
def test_round_robin_is_the_loop(data, padded, tokens, num_experts, seed):
    mask = mask_of(tokens, seed) if padded else torch.ones(tokens, dtype=torch.bool)
    k, turn, expected = data.draw(st.integers(1, num_experts)), 0, []
    for real in mask.tolist():
        expected.append([(turn + j) % num_experts for j in range(k)] if real else None)
        turn += k * real
    found = chosen(round_robin(torch.zeros(tokens, num_experts), RouterContext(mask=mask if padded else None), k=k))
    assert [row if real else None for row, real in zip(found, mask.tolist(), strict=True)] == expected
    load = [sum(e in row for row in expected if row) for e in range(num_experts)]
    assert max(load) - min(load) <= 1


# replay


def test_replay_gives_what_it_was_given():
    ids, selected = torch.tensor([[2, 0], [1, 1]]), torch.tensor([[True, True], [True, False]])
    assert chosen(replay(torch.zeros(2, 3), NONE, expert_ids=ids)) == [[2, 0], [1, 1]]
    assert chosen(replay(torch.zeros(2, 3), NONE, expert_ids=ids, selected=selected)) == [[2, 0], [1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_ids": torch.zeros(3, 1, dtype=torch.int64)}, r"expert_ids is torch.int64 \(3, 1\).* T = 2"),
        ({"expert_ids": torch.zeros(2, dtype=torch.int64)}, r"expert_ids is torch.int64 \(2,\)"),
        ({"expert_ids": torch.zeros(2, 1)}, r"expert_ids is torch.float32 \(2, 1\), must be torch.int64"),
        ({"expert_ids": torch.tensor([[0], [3]])}, "must lie between 0 and 2"),
        ({"expert_ids": torch.tensor([[-1], [0]])}, "must lie between 0 and 2"),
        (
            {"expert_ids": torch.tensor([[0], [1]]), "selected": torch.ones(2, 1)},
            r"selected is torch.float32 \(2, 1\), must be torch.bool \(2, 1\)",
        ),
        (
            {"expert_ids": torch.tensor([[0], [1]]), "selected": torch.ones(2, 2, dtype=torch.bool)},
            r"selected is torch.bool \(2, 2\), must be torch.bool \(2, 1\)",
        ),
    ],
)
def test_replay_refuses_what_does_not_fit(options, message):
    with pytest.raises(ConfigError, match=f"replay: .*{message}"):
        replay(torch.zeros(2, 3), NONE, **options)


# what they say of themselves


CLAIM = [name for name in SELECTORS if hasattr(load("selectors", name), "balances_load")]


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("name", CLAIM)
def test_who_claims_to_balance_at_least_halves_max_vio_on_skewed_scores(name, k):
    selector = load("selectors", name)
    for seed in range(5):
        logits = torch.randn(200, 10, generator=torch.Generator().manual_seed(seed)) + torch.linspace(0, 3, 10)
        context = RouterContext(training=True, token_ids=torch.arange(200))
        loads = [
            count_pairs(*choose(logits.softmax(-1), context), 10)
            for choose in (partial(selector, k=k), partial(top_k, k=k))
        ]
        assert max_vio(loads[0]) < max_vio(loads[1]) / 2 and max_vio(loads[1]) > 0.5


@pytest.mark.parametrize("name", having("selectors", "any_number"))
def test_a_selector_gives_k_experts_on_average_where_its_line_says_so(name):
    selector = load("selectors", name)
    if "k" not in inspect.signature(selector).parameters:
        return  # its balancer brings it there
    scores = (2 * torch.randn(600, 8, generator=torch.Generator().manual_seed(0))).sigmoid()
    choose = partial(selector, k=3, **getattr(selector, "toy_options", {}))
    _, selected = choose(scores, RouterContext(training=True))
    mean = selected.sum(-1).double().mean()
    assert (abs(mean - 3) < 0.05) == bool(fact("selectors", name, "mean_is_top_k"))


def test_the_selectors_that_balance_say_so():
    assert {"expert_choice", "sinkhorn", "round_robin"} <= set(CLAIM)


@pytest.mark.parametrize("name", SELECTORS)
def test_a_selector_of_any_number_says_so_in_its_line_and_what_its_rule_wants(name):
    selector = load("selectors", name)
    any_number = "max_k" in inspect.signature(selector).parameters
    assert bool(fact("selectors", name, "any_number")) == any_number == hasattr(selector, "wanted")
