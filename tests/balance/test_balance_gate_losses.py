"""Importance and load by hand and against plain loops; what every loss keeps to and refuses."""

import dataclasses
import math

import pytest
import torch
from free_router import one_step, random_logits, route
from strategies import WITH_LOSSES, E, T, build, look, random_look

from himoe import Importance, Load
from himoe.errors import ConfigError
from himoe.functional.gate_losses import importance, smooth_load, squared_variation
from himoe.functional.selection import top_k

LN2 = math.log(2)


def normal(x: float) -> float:
    """Φ."""
    return 0.5 * (1 + math.erf(x / 2**0.5))


# Importance


def test_importance_by_hand():
    # weights of two tokens over the selected: softmax of (ln 3, 0) = (3/4, 1/4) on experts 0, 1; (1/2, 1/2) on 1, 2
    logits = torch.tensor([[math.log(3), 0.0, -9.0], [-9.0, 1.0, 1.0]], dtype=torch.float64)
    routing = route(logits, 2)
    assert importance(routing).tolist() == pytest.approx([3 / 4, 3 / 4, 1 / 2])
    # mean 2/3, deviations (1/12, 1/12, −1/6): var = (1/144 + 1/144 + 4/144)/3 = 1/72; CV² = 1/72 · 9/4 = 1/32
    assert Importance(weight=0.4).losses(routing)["importance"].item() == pytest.approx(0.4 / 32)


def test_importance_is_of_weights_where_load_is_of_pairs():
    """Expert 1 has half the pairs of expert 0, and more weight."""
    logits = torch.tensor([[0.0, -9.0, 0.1], [0.0, -9.0, 0.1], [-9.0, 9.0, 0.0]], dtype=torch.float64)
    routing = route(logits, 2)
    assert torch.bincount(routing.expert_ids.flatten()).tolist() == [2, 1, 3]
    assert importance(routing)[1] > importance(routing)[0]


def test_importance_counts_what_was_selected_not_what_was_kept():
    routing = random_look()
    dropped = routing.replace(kept=torch.zeros_like(routing.kept))
    assert torch.equal(importance(routing), importance(dropped))
    fewer = routing.replace(selected=routing.selected & torch.tensor([True, False]))
    expected = torch.zeros(E, dtype=torch.float64)
    for ids, weights in zip(routing.expert_ids, routing.weights, strict=True):
        expected[ids[0]] += weights[0]
    assert torch.allclose(importance(fewer), expected, atol=1e-14)


def test_one_expert_per_token_and_weights_divided_by_their_sum_leave_importance_without_gradient():
    weight = random_logits(0, E, 4).requires_grad_()
    for renormalize, expected in ((True, False), (False, True)):
        routing = look(weight, random_logits(1, 9, 4), 1, renormalize=renormalize)
        (grad,) = torch.autograd.grad(Importance(weight=1.0).losses(routing)["importance"], weight)
        assert (grad.abs().max().item() > 1e-6) is expected


def test_squared_variation_by_hand():
    assert squared_variation(torch.tensor([1.0, 3.0])).item() == pytest.approx(0.25)
    assert squared_variation(torch.tensor([2.0, 2.0, 2.0])).item() == 0
    assert squared_variation(torch.zeros(4)).item() == 0
    assert squared_variation(torch.tensor([5.0])).item() == 0
    assert squared_variation(1e-30 * torch.tensor([1.0, 3.0])).item() == pytest.approx(0.25)


# Load


def loop_load(routing) -> list[float]:
    """The paper's sum, expert by expert: the K-th largest noisy logit of the others as the threshold."""
    context, loads = routing.context, [0.0] * routing.num_experts
    noisy = (routing.logits + context.noise).tolist()
    for t, row in enumerate(noisy):
        k = int(routing.selected[t].sum())
        for e in range(routing.num_experts):
            others = sorted((v for i, v in enumerate(row) if i != e), reverse=True)
            if k > len(others):
                loads[e] += 1
            elif k > 0:
                loads[e] += normal((routing.logits[t, e].item() - others[k - 1]) / context.noise_std[t, e].item())
    return loads


def test_load_by_hand():
    # one token, K = 1, clean (1, 0, 0), noise (−2, 1, 0.5): noisy (−1, 1, 0.5), so expert 1 is chosen.
    # Thresholds: 1 for expert 0, 0.5 for expert 1, 1 for expert 2; σ = 1, 1/2, 2.
    logits = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    noise = torch.tensor([[-2.0, 1.0, 0.5]], dtype=torch.float64)
    std = torch.tensor([[1.0, 0.5, 2.0]], dtype=torch.float64)
    routing = look(torch.eye(3).double(), logits, 1, noise=noise, std=std)
    expected = [0.5, normal(-1), normal(-0.5)]
    assert routing.expert_ids.tolist() == [[1]]
    assert smooth_load(routing, noise, std).tolist() == pytest.approx(expected)
    mean = sum(expected) / 3
    cv2 = sum((load - mean) ** 2 for load in expected) / 3 / mean**2
    assert Load(weight=0.7).losses(routing)["smooth_load"].item() == pytest.approx(0.7 * cv2)


@pytest.mark.parametrize("tokens", [1, 2, 13])
@pytest.mark.parametrize("k", [1, 2, 5, 7, 8])
def test_load_is_the_plain_loop(k, tokens):
    std = random_logits(3, tokens, E).exp()
    routing = random_look(k, tokens, k, std=std, noise=std * random_logits(4, tokens, E))
    found = smooth_load(routing, routing.context.noise, routing.context.noise_std)
    assert found.tolist() == pytest.approx(loop_load(routing), rel=1e-12)


def test_load_takes_each_tokens_own_number_of_experts():
    routing = random_look(5, 6, 4)
    selected = torch.arange(4) < torch.tensor([[4], [3], [2], [1], [0], [2]])
    routing = routing.replace(selected=selected)
    found = smooth_load(routing, routing.context.noise, routing.context.noise_std)
    assert found.tolist() == pytest.approx(loop_load(routing), rel=1e-12)


def test_load_with_ties_in_the_noisy_logits_is_the_plain_loop():
    logits = torch.tensor([[1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    for k in (1, 2, 3):
        routing = look(torch.eye(4).double(), logits, k, noise=torch.zeros(2, 4).double())
        found = smooth_load(routing, routing.context.noise, routing.context.noise_std)
        assert found.tolist() == pytest.approx(loop_load(routing), rel=1e-12)


def test_load_is_the_load_to_expect_when_one_experts_noise_is_drawn_anew():
    routing, draws = random_look(6, 5, 2), 20000
    context = routing.context
    counts = torch.zeros(E, dtype=torch.float64)
    for e in range(E):
        fresh = context.noise.expand(draws, 5, E).clone()
        fresh[..., e] = context.noise_std[:, e] * random_logits(7 + e, draws, 5)
        ids = top_k((routing.logits + fresh).view(-1, E), context, k=2)[0]
        counts[e] = (ids == e).sum() / draws
    found = smooth_load(routing, context.noise, context.noise_std)
    assert torch.allclose(found, counts, rtol=0, atol=5 * (5 * 0.25 / draws) ** 0.5)


def test_load_without_noise_is_finite_and_counts():
    routing = random_look(8, 9, 3, noise=torch.zeros(9, E).double(), std=torch.zeros(9, E).double())
    weight = routing.context.gate_weight.clone().requires_grad_()
    x = random_logits(9, 9, weight.shape[1]) + 0.3
    routing = look(weight, x, 3, noise=torch.zeros(9, E).double(), std=torch.zeros(9, E).double())
    found = smooth_load(routing, routing.context.noise, routing.context.noise_std)
    assert torch.allclose(found, torch.bincount(routing.expert_ids.flatten(), minlength=E).double())
    (grad,) = torch.autograd.grad(found.square().sum(), weight)
    assert grad.isfinite().all()


def test_load_says_nothing_in_eval_and_refuses_a_gate_without_noise():
    routing = random_look()
    evaluated = routing.replace(context=dataclasses.replace(routing.context, training=False))
    assert Load().losses(evaluated) == {}
    silent = routing.replace(context=dataclasses.replace(routing.context, noise=None, noise_std=None))
    with pytest.raises(ConfigError, match=r'load: the gate adds no noise.*set moe.gate = "noisy"'):
        Load().losses(silent)


# All


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", WITH_LOSSES)
def test_renaming_the_experts_changes_no_loss(name, score):
    """Over the whole table, after a step; all experts in one group."""
    order = torch.randperm(E, generator=torch.Generator().manual_seed(1))
    weight, x, noise, std = (
        random_logits(0, E, 4),
        random_logits(1, T, 4),
        random_logits(2, T, E),
        torch.rand(T, E) + 0.1,
    )
    found = []
    for names in (torch.arange(E), order):
        balancer = build(name, groups=1, rate=0.5)
        routing = look(weight[names], x, noise=noise[:, names], std=std[:, names].double(), score=score)
        one_step(balancer, routing)
        found.append({key: value.item() for key, value in balancer.losses(routing).items()})
    assert found[0] == pytest.approx(found[1], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", WITH_LOSSES)
def test_a_batch_without_a_token_is_finite(name):
    weight = random_logits(0, E, 4).requires_grad_()
    routing = look(weight, random_logits(1, 0, 4))
    value = sum(build(name).losses(routing).values())
    (grad,) = torch.autograd.grad(value, weight)
    assert value.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("name", ["importance", "load", "phi", "global_batch"])
def test_a_batch_of_padding_alone_costs_nothing(name):
    weight = random_logits(0, E, 4).requires_grad_()
    routing = look(weight, random_logits(1, 5, 4), mask=torch.zeros(5, dtype=torch.bool))
    value = sum(build(name, weight=1.0).losses(routing).values())
    assert value.item() == 0
    assert torch.autograd.grad(value, weight)[0].abs().max() == 0


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["importance", "load", "phi", "similarity", "global_batch"])
def test_a_wrong_weight_is_refused(name, weight):
    with pytest.raises(ConfigError, match=f"{name}: weight = {weight} must be ≥ 0 and finite"):
        build(name, weight=weight)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("phi", {"source": "both"}, "source = 'both' raw or corrected"),
        ("phi", {"rate": 0.0}, "phi: rate = 0.0 must be above 0 and at most 1"),
        ("phi", {"rate": 1.5}, "phi: rate = 1.5 must be above 0 and at most 1"),
        ("global_batch", {"source": "both"}, "source = 'both' raw or corrected"),
        ("similarity", {"norm": "l2"}, "norm = 'l2' frobenius or l1"),
    ],
)
def test_wrong_options_are_refused(name, options, text):
    with pytest.raises(ConfigError, match=text):
        build(name, **options)
