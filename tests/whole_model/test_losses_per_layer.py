"""Losses per layer, their constants at perfect balance, and the gradient they give the gates."""

import math
from functools import partial

import pytest
import torch
from router_zoo import loss_of, make_model, token_ids
from torch import nn

import himoe
from himoe import MoE, Router
from himoe.balance import Chain, Switch, TwoLevelTerms, ZLoss
from himoe.functional import scores
from himoe.functional.groups import Groups
from himoe.functional.selection import top_k, top_k_per_group

pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")


def free_layer(num_experts: int, k: int, balancer=None, score=scores.softmax, groups=None) -> MoE:
    """A layer whose tokens are their own logits."""
    select = partial(top_k, k=k) if groups is None else partial(top_k_per_group, groups=groups, k=k)
    router = Router(nn.Identity(), select, num_experts=num_experts, balancer=balancer, score=score)
    return MoE(router, lambda x, *_: x)


def test_layers_with_opposite_imbalance_never_cancel():
    model = nn.ModuleList([free_layer(2, 1, Switch(weight=1.0)) for _ in range(2)])
    first, second = torch.tensor([[5.0, -5.0]] * 8), torch.tensor([[-5.0, 5.0]] * 8)
    routings = [model[0](first)[1], model[1](second)[1]]
    together = himoe.aux_losses(model, routings)["load_balance"].item()
    each = [layer.router.balancer.losses(r)["load_balance"].item() for layer, r in zip(model, routings, strict=True)]
    assert together == pytest.approx(sum(each)) == pytest.approx(2 * 2.0, rel=1e-3)
    pooled = free_layer(2, 1)(torch.cat([first, second]))[1]
    assert Switch(weight=1.0).losses(pooled)["load_balance"].item() == pytest.approx(1.0)  # what must not be reported


def balanced_logits(num_experts: int, k: int) -> torch.Tensor:
    """Token t prefers experts t … t + k − 1, round and round: loads and mean probabilities are equal."""
    logits = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    for token in range(num_experts):
        for place in range(k):
            logits[token, (token + place) % num_experts] = 2.0 - 0.1 * place
    return logits


@pytest.mark.parametrize("score", [scores.softmax, scores.sigmoid])
@pytest.mark.parametrize("k", range(1, 7))
def test_switch_is_alpha_at_perfect_balance_for_every_k_and_score(k, score):
    routing = free_layer(6, k, score=score)(balanced_logits(6, k))[1]
    for source in ("raw", "corrected"):
        value = Switch(weight=0.3, source=source).losses(routing)["load_balance"].item()
        assert value == pytest.approx(0.3, rel=1e-7)


E, G, S = 12, 4, 3
UNIFORM = {
    "global": 1 / E,
    "group_conditional": 1 / S,
    "entropy": -math.log(E),
    "group_entropy": -math.log(S),
}
UNIFORM_INTER = {
    "dense": lambda k: 1 / G,
    "sparse": lambda k: G * (k / E) ** 2,
    "selected": lambda k: G * k / E**2,
    "entropy": lambda k: -math.log(G),
    "group_load": lambda k: 0.0,
}


@pytest.mark.parametrize("score", [scores.softmax, scores.sigmoid])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_two_level_terms_and_z_loss_have_their_constants_at_uniform_probabilities(k, score):
    groups = Groups.equal(E, G)
    routing = free_layer(E, k, score=score, groups=groups)(torch.zeros(5, E, dtype=torch.float64))[1]
    for source in ("raw", "corrected"):
        for intra, a in UNIFORM.items():
            for inter, b in UNIFORM_INTER.items():
                found = TwoLevelTerms(E, groups, intra=intra, inter=inter, source=source).measures(routing)
                assert found["intra"].item() == pytest.approx(a, rel=1e-12)
                assert found["inter"].item() == pytest.approx(b(k), rel=1e-12, abs=1e-15)
    assert ZLoss(weight=1.0).losses(routing)["z_loss"].item() == pytest.approx(math.log(E) ** 2)


def test_no_epsilon_lets_a_term_fall_below_its_minimum():
    """Terms of a perfectly even group mass, or perfectly even experts, never undercut their bound."""
    groups = Groups.equal(E, G)
    for scale in (0.0, 1e-3, 1.0, 20.0):
        logits = scale * torch.randn(1, S, dtype=torch.float64).repeat(1, G)  # every group alike: m_g = 1/G
        routing = free_layer(E, 1, groups=groups)(logits)[1]
        found = TwoLevelTerms(E, groups, intra="global", inter="dense").measures(routing)
        assert found["inter"].item() == pytest.approx(1 / G, rel=1e-12)
        assert found["intra"].item() >= 1 / E - 1e-15
    for score in (scores.softmax, scores.sigmoid):
        tiny = free_layer(4, 1, score=score)(torch.eye(4) * 1e-6 - 60.0)[1]  # sigmoid scores of 1e-26
        assert Switch(weight=1.0).losses(tiny)["load_balance"].item() == pytest.approx(1.0, abs=1e-6)


def test_each_of_many_auxiliary_terms_alone_trains_every_gate():
    model = make_model("everything")
    _, routings = loss_of(model, token_ids())
    himoe.observe(model, routings)
    himoe.step(model)  # a warm-up is 0 before
    _, routings = model(token_ids())
    gates = [layer.router.gate.weight for layer in himoe.moe_layers(model)]
    terms = himoe.aux_losses(model, routings)
    del terms["relu_sparsity"]  # of softmax scores, all positive, it is a constant
    for term in terms.values():
        grads = torch.autograd.grad(term, gates, retain_graph=True)
        assert all(grad.isfinite().all() and grad.abs().max() > 1e-8 for grad in grads)


def test_the_gradient_of_a_layer_is_linear_in_its_coefficients():
    grads = []
    for factor in (1.0, 4.0):
        layer = free_layer(E, 1, groups=Groups.equal(E, G))
        layer.router.balancer = Chain(
            Switch(weight=0.1 * factor), ZLoss(weight=0.2 * factor),
            TwoLevelTerms(E, G, lambda_intra=0.3 * factor, lambda_inter=0.4 * factor),
        )  # fmt: skip
        x = torch.randn(9, E, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (grad,) = torch.autograd.grad(sum(himoe.aux_losses(layer, [layer(x)[1]]).values()), x)
        grads.append(grad)
    assert torch.allclose(4 * grads[0], grads[1], rtol=1e-12)
