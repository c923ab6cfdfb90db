"""Expert threshold routing: cutoffs against exact quantiles, K experts on average, equal loads, causality."""

import pytest
import torch
from free_router import one_step, random_logits
from torch import nn

from himoe import Router
from himoe.balance import ExpertThreshold
from himoe.errors import ConfigError
from himoe.functional import scores, stats


def above_zero(choice, context):
    """Every expert of positive score."""
    return torch.arange(choice.shape[1]).expand_as(choice), choice > 0


def route(logits, balancer, score: str = "softmax", mask=None):
    """Route logits by threshold, in training mode."""
    router = Router(
        nn.Identity(), above_zero, num_experts=logits.shape[1], score=getattr(scores, score), balancer=balancer
    )
    return router(logits, mask)


def skewed(seed: int, tokens: int, num_experts: int):
    return random_logits(seed, tokens, num_experts) + torch.linspace(1.5, -1.5, num_experts, dtype=torch.float64)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_experts", "k"), [(8, 2), (5, 4), (64, 3)])
def test_the_first_step_sets_the_exact_quantile_and_more_make_it_finer(num_experts, k, score):
    logits = skewed(0, 2000, num_experts)
    values = getattr(scores, score)(logits)
    low, high = (values.quantile(1 - k / num_experts, dim=0, interpolation=side) for side in ("lower", "higher"))
    balancer = ExpertThreshold(num_experts, k, beta=0.0)
    for tolerance in (0.07, 0.005):
        one_step(balancer, route(logits, balancer, score))
        assert (balancer.cutoff > low * (1 - tolerance)).all() and (balancer.cutoff < high * (1 + tolerance)).all()
    assert low.max() > 1.4 * low.min()


def test_the_running_mean_is_plain_at_first_and_forgets_later():
    batches = [skewed(seed, 500, 4) for seed in range(6)]
    quantiles = [b.softmax(-1).quantile(0.75, dim=0) for b in batches]
    balancer, expected = ExpertThreshold(4, 1, beta=0.75), torch.zeros(4, dtype=torch.float64)
    for step, (logits, exact) in enumerate(zip(batches, quantiles, strict=True)):
        weight = max(0.25, 1 / (step + 1))  # 1, 1/2, 1/3, then 1/4
        expected = (1 - weight) * expected + weight * exact
        one_step(balancer, route(logits, balancer))
        torch.testing.assert_close(balancer.cutoff.double(), expected, rtol=0.02, atol=0)
    assert balancer.num_steps.item() == 6


def test_it_starts_dense_or_at_the_stated_cutoff():
    logits = skewed(0, 50, 4)
    assert route(logits, ExpertThreshold(4, 1)).selected.all()
    balancer = ExpertThreshold(4, 1, start=0.3)
    routing = route(logits, balancer)
    assert torch.equal(routing.selected, logits.softmax(-1) > balancer.cutoff)
    one_step(balancer, routing)
    balancer.reset_parameters()
    assert balancer.cutoff.tolist() == pytest.approx([0.3] * 4) and balancer.num_steps == 0


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_experts", "k"), [(16, 2), (128, 4)])
def test_tokens_get_k_experts_on_average_and_experts_equal_loads(num_experts, k, score):
    balancer = ExpertThreshold(num_experts, k)
    for step in range(8):
        one_step(balancer, route(skewed(step, 2000, num_experts), balancer, score))
    routing = route(skewed(99, 20000, num_experts), balancer, score)
    per_token = routing.selected.sum(-1)
    assert per_token.double().mean().item() == pytest.approx(k, rel=0.03)
    assert per_token.min() < k < per_token.max()  # more or fewer each
    assert stats.max_vio(stats.selected_load(routing)) < 0.25


def test_micro_batches_and_padding_give_exactly_the_cutoff_of_one_batch():
    logits = skewed(1, 90, 6)
    mask = torch.arange(90) % 5 != 2
    whole, parts, real = (ExpertThreshold(6, 2) for _ in range(3))
    for _ in range(3):
        one_step(whole, route(logits, whole, mask=mask))
        cuts = [40, 1, 49]
        pairs = zip(logits.split(cuts), mask.split(cuts), strict=True)
        one_step(parts, *[route(some, parts, mask=m) for some, m in pairs])
        one_step(real, route(logits[mask], real))
    assert whole.cutoff.min() > 0.01
    assert torch.equal(whole.cutoff, parts.cutoff)
    assert torch.equal(whole.cutoff, real.cutoff)
    assert whole.num_steps == parts.num_steps == 3


def test_a_step_of_padding_alone_neither_moves_nor_counts():
    balancer = ExpertThreshold(4, 1)
    one_step(balancer, route(skewed(0, 20, 4), balancer))
    before = balancer.cutoff.clone()
    one_step(balancer, route(skewed(1, 20, 4), balancer, mask=torch.zeros(20, dtype=torch.bool)))
    assert torch.equal(before, balancer.cutoff) and balancer.num_steps == 1


def test_later_tokens_do_not_move_earlier_ones_and_expert_choice_would():
    balancer, logits = ExpertThreshold(8, 2), skewed(0, 40, 8)
    one_step(balancer, route(skewed(1, 200, 8), balancer))
    changed = torch.cat([logits[:20], skewed(2, 20, 8) * 5])
    one, other = route(logits, balancer), route(changed, balancer)
    assert torch.equal(one.selected[:20], other.selected[:20])
    assert not torch.equal(one.selected[20:], other.selected[20:])
    assert balancer.causal


def test_with_k_equal_to_e_the_cutoff_stays():
    balancer = ExpertThreshold(4, 4)
    one_step(balancer, route(skewed(0, 20, 4), balancer))
    assert balancer.cutoff.tolist() == [0.0] * 4
    assert route(skewed(0, 20, 4), balancer).selected.all()


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ((4, 0), {}, "expert_threshold: top_k = 0 must be between 1 and num_experts = 4"),
        ((4, 5), {}, "expert_threshold: top_k = 5"),
        ((4, 1), {"beta": 1.0}, "beta = 1.0 must be in"),
        ((4, 1), {"start": float("nan")}, "start = nan finite"),
    ],
)
def test_wrong_options(arguments, options, text):
    with pytest.raises(ConfigError, match=text):
        ExpertThreshold(*arguments, **options)
