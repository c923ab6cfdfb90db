"""The gradient of the gate's matrix from each auxiliary term alone: the one derived by hand, in fp64; over the whole
table: linear in its coefficient, none from padding.

Notation: W the gate's matrix, x tokens, z = xWᵀ logits, p = softmax(z), S = Σ of what a CV² is taken of.
"""

import math

import pytest
import torch
from free_router import one_step, random_logits
from strategies import WITH_LOSSES, D, E, T, build, coefficients, look, random_look
from torch import Tensor

from himoe import Chain, GlobalBatch, Importance, Load, Phi, Routing, Similarity, ZLoss, registry
from himoe.balance.base import Balancer

WEIGHT, X = random_logits(1, E, D), random_logits(2, T, D) + 0.3


def gradient(balancer: Balancer, x: Tensor = X, k: int = 2, *, retouch=None, **options) -> Tensor:
    """Of the gate's matrix."""
    leaf = WEIGHT.clone().requires_grad_()
    routing = look(leaf, x, k, balancer=balancer, **options)
    routing = routing if retouch is None else retouch(routing)
    (found,) = torch.autograd.grad(sum(balancer.losses(routing).values()), leaf)
    return found


def of_matrix(d_logits: Tensor) -> Tensor:
    return d_logits.T @ X


def slope_of_squared_variation(values: Tensor) -> Tensor:
    """∂(E·Σv²/S² − 1)/∂v."""
    total = values.sum()
    return 2 * len(values) / total**2 * (values - (values**2).sum() / total)


@pytest.mark.parametrize("k", [2, 3, E])
def test_gradient_of_importance(k):
    routing = random_routing_of(k)
    dense = torch.zeros(T, E, dtype=torch.float64).scatter(1, routing.expert_ids, routing.weights)
    h = slope_of_squared_variation(dense.sum(0))
    expected = of_matrix(0.4 * dense * (h - (dense * h).sum(-1, keepdim=True)))  # weights: a softmax over the selected
    found = gradient(Importance(weight=0.4), k=k)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)  # the router divides by the sum + 1e-10
    assert found.abs().max() > 1e-3


def random_routing_of(k: int) -> Routing:
    return look(WEIGHT, X, k)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_gradient_of_load_also_to_the_noises_size(k):
    standard = random_logits(3, T, E)
    std = (0.3 * random_logits(4, T, E)).exp()
    z = X @ WEIGHT.T
    noisy, u, of = z + std * standard, torch.zeros(T, E, dtype=torch.float64), torch.zeros(T, E, dtype=torch.int64)
    for t in range(T):
        for e in range(E):
            others = sorted((i for i in range(E) if i != e), key=lambda i, t=t: -noisy[t, i].item())
            of[t, e] = others[k - 1]
            u[t, e] = (z[t, e] - noisy[t, others[k - 1]]) / std[t, e]
    density = (-u.square() / 2).exp() / math.sqrt(2 * math.pi)
    h = 0.7 * slope_of_squared_variation(0.5 * (1 + torch.erf(u / 2**0.5)).sum(0))
    d_logits, d_std = h * density / std, -h * density * u / std
    for t in range(T):
        for e in range(E):  # the threshold moves with the logit, and with the size of the noise, of the expert it is of
            pull = h[e] * density[t, e] / std[t, e]
            d_logits[t, of[t, e]] -= pull
            d_std[t, of[t, e]] -= pull * standard[t, of[t, e]]
    leaf, std = WEIGHT.clone().requires_grad_(), std.requires_grad_()
    routing = look(leaf, X, k, noise=std * standard, std=std)
    value = Load(weight=0.7).losses(routing)["smooth_load"]
    found, found_std = torch.autograd.grad(value, [leaf, std])
    assert torch.allclose(found, of_matrix(d_logits), rtol=0, atol=1e-12)
    assert torch.allclose(found_std, d_std, rtol=0, atol=1e-12)
    assert found.abs().max() > 1e-3 and found_std.abs().max() > 1e-3


def test_all_experts_chosen_leave_load_without_gradient():
    assert gradient(Load(), k=E).abs().max() == 0


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradient_of_phi(score):
    phi = Phi(E, weight=0.4, rate=0.5)
    one_step(phi, random_look(5))
    slope = phi.mean_probabilities.double().log() + 1
    z = X @ WEIGHT.T + random_logits(99, T, E, scale=0.5)  # scores are of the noisy logits
    s = z.exp() if score == "softmax" else z.sigmoid()
    ds = s if score == "softmax" else s * (1 - s)
    total = s.sum(-1, keepdim=True)
    expected = of_matrix(0.4 / T * ds / total * (slope - (slope * s).sum(-1, keepdim=True) / total))
    assert torch.allclose(gradient(phi, score=score), expected, rtol=0, atol=1e-13)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("k", [1, 3])
def test_gradient_of_global_batch_takes_f_from_the_counts_it_is_given(k):
    counts = torch.tensor([90, 10, 30, 0, 25, 5, 20, 20])
    p = (X @ WEIGHT.T).softmax(-1)
    f = counts / counts.sum().double()
    expected = of_matrix(0.4 * E / T * p * (f - (p * f).sum(-1, keepdim=True)))
    balancer = GlobalBatch(weight=0.4, source="raw")
    found = gradient(balancer, k=k, retouch=lambda routing: routing.replace(step_counts=counts))
    assert torch.allclose(found, expected, rtol=0, atol=1e-13)
    assert not torch.allclose(found, gradient(balancer, k=k), rtol=0, atol=1e-3)


@pytest.mark.parametrize("norm", ["frobenius", "l1"])
def test_gradient_of_similarity(norm):
    lengths = WEIGHT.norm(dim=-1, keepdim=True)
    rows = WEIGHT / lengths
    excess = rows @ rows.T - torch.eye(E)
    excess.fill_diagonal_(0)
    d_rows = 4 * excess @ rows if norm == "frobenius" else 2 * excess.sign() @ rows
    expected = 0.3 * (d_rows - (d_rows * rows).sum(-1, keepdim=True) * rows) / lengths
    found = gradient(Similarity(weight=0.3, norm=norm))
    assert torch.allclose(found, expected, rtol=0, atol=1e-13)
    assert found.abs().max() > 1e-2


# The whole table

EACH_COEFFICIENT = [(name, key) for name in WITH_LOSSES for key in coefficients(name)]


def with_coefficient(name: str, key: str, value: float) -> Balancer:
    """The strategy after a step, with one coefficient in force; a loss of 0 beside it, so that there always is one."""
    others = dict.fromkeys(coefficients(name), 0.0)
    balancer = Chain(build(name, **others | {key: value}), ZLoss(weight=0.0))
    one_step(balancer, random_look(8))
    return balancer


def test_every_loss_that_claims_to_balance_has_a_coefficient():
    assert all(coefficients(name) for name in WITH_LOSSES if registry.load("balancers", name).balances_load)
    assert len(EACH_COEFFICIENT) >= 10


@pytest.mark.parametrize(("name", "key"), EACH_COEFFICIENT)
def test_the_gradient_is_linear_in_the_coefficient(name, key):
    once, thrice, none = (gradient(with_coefficient(name, key, value)) for value in (0.1, 0.3, 0.0))
    assert torch.allclose(thrice, 3 * once, rtol=1e-6, atol=1e-15)
    assert once.abs().max() > 1e-4 and none.abs().max() == 0


def after_a_step(name: str, x: Tensor, noise: Tensor, mask: Tensor | None, score: str) -> list[Tensor]:
    """The loss, and its gradients of the gate's matrix and of the tokens, after a step that saw the same batch."""
    balancer = build(name, **dict.fromkeys(coefficients(name), 0.7))
    weight, x = (leaf.clone().requires_grad_() for leaf in (WEIGHT, x))
    routing = look(weight, x, mask=mask, noise=noise, score=score, balancer=balancer)
    one_step(balancer, routing)
    value = sum(balancer.losses(routing).values())
    return [value, *torch.autograd.grad(value, [weight, x], materialize_grads=True)]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", WITH_LOSSES)
def test_padding_has_no_gradient_and_takes_none(name, score):
    mask, noise = torch.arange(T) % 3 > 0, random_logits(7, T, E)
    padded = X * (1 + 9 * ~mask[:, None])
    value, weight, x = after_a_step(name, X[mask], noise[mask], None, score)
    value_p, weight_p, x_p = after_a_step(name, padded, noise, mask, score)
    assert value_p.item() == pytest.approx(value.item(), rel=1e-7)
    assert x_p[~mask].abs().max() == 0
    assert torch.allclose(x_p[mask], x, rtol=1e-6, atol=1e-12)
    assert torch.allclose(weight_p, weight, rtol=1e-6, atol=1e-12)
    assert weight.abs().max() > 0


CONSTANT_SUMS = {"softmax", "softmax_per_group"}
"""Scores that are all positive and add up to 1: the loss of `relu_sparsity` is a constant there."""


@pytest.mark.parametrize("score", sorted(registry.SCORES))
@pytest.mark.parametrize("name", WITH_LOSSES)
def test_the_gradient_is_the_slope_of_the_loss_for_every_score(name, score):
    """Central differences along some directions of the gate's matrix: nothing is cut off that has a gradient."""
    balancer = build(name, **dict.fromkeys(coefficients(name), 0.7), start=0.7)
    one_step(balancer, random_look(8, score=score))
    noise = random_logits(7, T, E)

    def value(weight: Tensor) -> Tensor:
        return sum(balancer.losses(look(weight, X, noise=noise, score=score, balancer=balancer)).values())

    leaf = WEIGHT.clone().requires_grad_()
    (found,) = torch.autograd.grad(value(leaf), leaf)
    for seed in range(3):
        direction = random_logits(20 + seed, E, D)
        slope = (value(WEIGHT + 1e-6 * direction) - value(WEIGHT - 1e-6 * direction)) / 2e-6
        assert (found * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-7)
    assert (found.abs().max() > 1e-4) != (name == "relu_sparsity" and score in CONSTANT_SUMS)
