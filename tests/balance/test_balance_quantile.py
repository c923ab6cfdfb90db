"""Quantile Balancing: the bias against exact quantiles, how fast it settles, and what may not matter."""

import pytest
import torch
from free_router import choices, one_step, random_logits, route

from himoe import RouterContext
from himoe.balance import PerGroup, Quantile
from himoe.errors import ConfigError
from himoe.functional import stats
from himoe.functional.groups import Groups
from himoe.functional.histogram import edges


def bounds(logits, bias, k: int, size: int, space: str, score: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Between what the new bias must lie: loops over groups, tokens and experts, torch.quantile, the width of a bin."""
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    ranked = (scores.log() if space == "log" else scores) + bias
    inner, low, high = edges(logits.device)[1:-1].contiguous(), [], []
    for start in range(0, logits.shape[1], size):
        columns = range(start, start + size)
        cutoffs = [sorted((row[e] for e in columns), reverse=True)[k] for row in ranked.tolist()]
        distances = torch.tensor(cutoffs, dtype=torch.float64)[:, None] - ranked[:, start : start + size]
        below = distances.quantile(k / size, dim=0, interpolation="lower")
        above = distances.quantile(k / size, dim=0, interpolation="higher")
        below = inner[torch.bucketize(below, inner) - 1]
        above = inner[torch.bucketize(above, inner)]
        low.append(below - above.mean())
        high.append(above - below.mean())
    return bias + torch.cat(low), bias + torch.cat(high)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("space", ["log", "linear"])
@pytest.mark.parametrize(("num_experts", "k", "groups"), [(6, 2, 1), (8, 1, 1), (8, 1, 2), (12, 2, 3), (5, 4, 1)])
def test_the_bias_is_the_quantile_of_the_exact_values(num_experts, k, groups, space, score):
    logits = random_logits(0, 1000, num_experts) + torch.linspace(1, -1, num_experts, dtype=torch.float64)
    balancer, moved = Quantile(num_experts, k * groups, selection_groups=groups, space=space), []
    for _ in range(5):
        low, high = bounds(logits, balancer.bias.double(), k, num_experts // groups, space, score)
        before = balancer.bias.double()
        one_step(balancer, route(logits, k, groups=groups, balancer=balancer, score=score))
        assert (balancer.bias > low - 1e-6).all() and (balancer.bias < high + 1e-6).all()
        moved.append((balancer.bias - before).abs().max().item())
    assert (high - low).max() < 0.1 * balancer.bias.abs().max()  # the bins are as fine as the bias is near
    assert moved[-1] < 0.2 * moved[0]


def settle(num_experts: int, k: int, score: str, space: str, tokens: int, steps: int) -> list[float]:
    """MaxVio of every step for logits that favour the first experts."""
    logits = random_logits(0, tokens, num_experts).float() + torch.linspace(1.5, -1.5, num_experts)
    balancer, found = Quantile(num_experts, k, space=space), []
    for _ in range(steps):
        routing = route(logits, k, balancer=balancer, score=score)
        found.append(stats.max_vio(stats.load(routing)).item())
        one_step(balancer, routing)
    return found


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("space", ["log", "linear"])
@pytest.mark.parametrize(("num_experts", "k"), [(16, 2), (256, 8)])
def test_it_settles_in_few_steps_for_few_and_many_experts(num_experts, k, score, space):
    found = settle(num_experts, k, score, space, tokens=4096, steps=7)
    assert found[0] > 2
    assert max(found[5:]) < 0.15


def test_micro_batches_and_padding_give_exactly_the_bias_of_one_batch():
    logits = random_logits(1, 90, 8)
    mask = torch.arange(90) % 5 != 2
    whole, parts, real = (Quantile(8, 2) for _ in range(3))
    for _ in range(3):
        one_step(whole, route(logits, 2, balancer=whole, mask=mask))
        cuts = [40, 1, 49]
        pairs = zip(logits.split(cuts), mask.split(cuts), strict=True)
        one_step(parts, *[route(some, 2, balancer=parts, mask=m) for some, m in pairs])
        one_step(real, route(logits[mask], 2, balancer=real))
    assert whole.bias.abs().max() > 0.1
    assert torch.equal(whole.bias, parts.bias)
    assert torch.equal(whole.bias, real.bias)


def test_one_balancer_over_groups_is_one_for_every_group():
    logits = random_logits(2, 200, 8)
    one = Quantile(8, 4, selection_groups=2)
    each = PerGroup(Groups.equal(8, 2), [Quantile(4, 2), Quantile(4, 2)])
    for _ in range(2):
        for balancer in (one, each):
            one_step(balancer, route(logits, 2, groups=2, balancer=balancer))
    assert one.bias.abs().max() > 0.05
    torch.testing.assert_close(one.bias, torch.cat([part.bias for part in each.parts]))


def test_for_softmax_scores_it_ranks_by_logit_plus_bias():
    logits = random_logits(3, 50, 6)
    balancer = Quantile(6, 2)
    balancer.bias.copy_(torch.tensor([3.0, -1.0, 0.5, 0.0, 2.0, -2.0]))
    routing = route(logits, 2, balancer=balancer)
    assert torch.equal(routing.expert_ids, (logits + balancer.bias).topk(2).indices)
    assert torch.equal(routing.scores, logits.softmax(-1))  # the weights know nothing of the bias


def test_equal_loads_move_nothing():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).repeat(10, 1)
    balancer = Quantile(2, 1)
    one_step(balancer, route(logits, 1, balancer=balancer))
    assert balancer.bias.abs().max() < 1e-6


@pytest.mark.parametrize(("num_experts", "k", "groups"), [(4, 4, 1), (8, 8, 2)])
def test_with_every_expert_chosen_the_bias_stays_0(num_experts, k, groups):
    balancer = Quantile(num_experts, k, selection_groups=groups)
    one_step(balancer, route(random_logits(0, 20, num_experts), k // groups, groups=groups, balancer=balancer))
    assert balancer.bias.tolist() == [0.0] * num_experts and not balancer.sums


def test_smoothing_keeps_a_share_of_the_old_bias():
    logits = random_logits(4, 500, 8) + torch.linspace(1, -1, 8, dtype=torch.float64)
    plain, smooth = Quantile(8, 2), Quantile(8, 2, smoothing=0.75)
    for balancer in (plain, smooth):
        one_step(balancer, route(logits, 2, balancer=balancer))
    torch.testing.assert_close(smooth.bias, 0.25 * plain.bias)


def test_the_bias_is_recentred_and_scores_that_underflow_stay_finite():
    balancer = Quantile(4, 1)
    one_step(balancer, route(random_logits(0, 40, 4, scale=1e4).float(), 1, balancer=balancer))
    assert balancer.bias.isfinite().all() and balancer.bias.abs().max() <= 512
    assert balancer.bias.mean().item() == pytest.approx(0, abs=1e-5)


def test_one_expert_with_all_tokens_gives_them_up():
    logits = random_logits(0, 400, 8) + 6 * torch.eye(8, dtype=torch.float64)[0]
    balancer = Quantile(8, 1)
    before = stats.max_vio(stats.load(route(logits, 1, balancer=balancer))).item()
    for _ in range(6):
        one_step(balancer, route(logits, 1, balancer=balancer))
    assert before > 6
    assert stats.max_vio(stats.load(route(logits, 1, balancer=balancer))).item() < 0.1


def test_it_counts_in_int64_and_does_not_look_at_the_choice():
    balancer = Quantile(4, 1)
    balancer.observe(choices([[0], [1]], 4))
    assert balancer.sums["distances"].dtype == torch.int64 and balancer.sums["distances"].sum() == 8
    assert balancer.bias_step is None


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ((4, 0), {}, "quantile: top_k = 0"),
        ((4, 5), {}, "quantile: top_k = 5"),
        ((8, 3), {"selection_groups": 2}, "top_k = 3 from groups of"),
        ((8, (1, 2)), {"selection_groups": 2}, "for others set per_group = true"),
        ((3, 2), {"selection_groups": Groups(((0,), (1, 2)))}, "needs equal contiguous groups"),
        ((8, 2), {"space": "logit"}, "quantile: space = 'logit' must be log or linear"),
        ((8, 2), {"smoothing": 1.0}, "smoothing = 1.0 in"),
    ],
)
def test_wrong_options(arguments, options, text):
    with pytest.raises(ConfigError, match=text):
        Quantile(*arguments, **options)


def test_the_choice_has_the_order_of_log_scores_plus_bias_and_stays_positive():
    """So selectors that add scores up, or compare them with 0, still see scores."""
    balancer = Quantile(6, 2)
    with torch.no_grad():
        balancer.bias.copy_(torch.tensor([2.0, -3.0, 0.0, 1.0, -1.0, 1.0]))
    scores = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)
    choice = balancer.adjust_choice(scores, RouterContext())
    assert (choice > 0).all()
    assert torch.equal(choice.argsort(-1), (scores.log() + balancer.bias).argsort(-1))
    assert (balancer.adjust_choice(torch.zeros(1, 6), RouterContext()) == 0).all()
