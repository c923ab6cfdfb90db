"""The router gradient of every auxiliary term equals the one derived by hand, in fp64, and is linear in its weight.

Notation: T tokens, z logits, p = softmax(z), m group masses, q = p/m shares, M mean masses, f shares of the load.
"""

import pytest
import torch
from free_router import one_step, random_logits, route
from torch import Tensor

from himoe import Gate, Groups
from himoe.balance import Chain, DualAscent, LogitCorrection, Switch, TwoLevelTerms, ZLoss

T, E = 11, 8
EQUAL = Groups.equal(E, 4)
UNEQUAL = Groups(((0, 3, 5), (1,), (2, 4, 6, 7)))


def member(groups: Groups) -> Tensor:
    """The (G, E) matrix that is 1 where an expert stands in a group."""
    return torch.stack(
        [torch.tensor([float(g == of) for of in groups.group_of]) for g in range(groups.num_groups)]
    ).double()


def gradient(balancer, logits, k=1, **options) -> Tensor:
    logits = logits.clone().requires_grad_()
    routing = route(logits, k, balancer=balancer, **options)
    (found,) = torch.autograd.grad(sum(balancer.losses(routing).values()), logits)
    return found


def chosen(logits, k, groups) -> Tensor:
    routing = route(logits, k, groups=groups)
    return torch.zeros_like(logits).scatter(1, routing.expert_ids, 1.0)


def d_intra_global(p, groups, sel):
    return 2 * p * (p - (p**2).sum(-1, keepdim=True))


def d_intra_group_conditional(p, groups, sel):
    a = member(groups)
    q = p / (p @ a.T @ a)
    return 2 * q * (q - (q**2) @ a.T @ a) / groups.num_groups


def d_intra_entropy(p, groups, sel):
    return p * (p.log() - (p * p.log()).sum(-1, keepdim=True))


def d_intra_group_entropy(p, groups, sel):
    a = member(groups)
    q = p / (p @ a.T @ a)
    return q * (q.log() - (q * q.log()) @ a.T @ a) / groups.num_groups


def d_inter_dense(p, groups, sel):
    a = member(groups)
    m = p @ a.T
    return 2 * p * (m @ a - (m**2).sum(-1, keepdim=True))


def d_inter_sparse(p, groups, sel):
    a = member(groups)
    m = (p * sel) @ a.T
    return 2 * p * (sel * (m @ a) - (m**2).sum(-1, keepdim=True))


def d_inter_selected(p, groups, sel):
    return 2 * p * (sel * p - (sel * p**2).sum(-1, keepdim=True))


def d_inter_entropy(p, groups, sel):
    a = member(groups)
    m = p @ a.T
    return p * (m.log() @ a - (m * m.log()).sum(-1, keepdim=True))


def d_inter_group_load(p, groups, sel):
    a = member(groups)
    excess = (p @ a.T).mean(0) - 1 / groups.num_groups
    return 2 * p * (excess @ a - ((p @ a.T) * excess).sum(-1, keepdim=True))


D_INTRA = {
    "global": d_intra_global,
    "group_conditional": d_intra_group_conditional,
    "entropy": d_intra_entropy,
    "group_entropy": d_intra_group_entropy,
}
D_INTER = {
    "dense": d_inter_dense,
    "sparse": d_inter_sparse,
    "selected": d_inter_selected,
    "entropy": d_inter_entropy,
    "group_load": d_inter_group_load,
}


@pytest.mark.parametrize("groups", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize("intra", D_INTRA)
def test_gradient_of_every_intra_term(intra, groups):
    logits = random_logits(1, T, E)
    terms = TwoLevelTerms(E, groups, intra=intra, lambda_intra=0.3, lambda_inter=0.0)
    expected = -0.3 * D_INTRA[intra](logits.softmax(-1), groups, None) / T
    assert torch.allclose(gradient(terms, logits, groups=groups), expected, rtol=0, atol=1e-14)
    assert expected.abs().max() > 1e-4


@pytest.mark.parametrize(("groups", "k"), [(EQUAL, 1), (EQUAL, 2), (UNEQUAL, (2, 1, 3))], ids=["k1", "k2", "unequal"])
@pytest.mark.parametrize("inter", D_INTER)
def test_gradient_of_every_inter_term(inter, groups, k):
    logits = random_logits(2, T, E)
    terms = TwoLevelTerms(E, groups, inter=inter, lambda_inter=0.7, lambda_intra=0.0)
    expected = 0.7 * D_INTER[inter](logits.softmax(-1), groups, chosen(logits, k, groups)) / T
    assert torch.allclose(gradient(terms, logits, k, groups=groups), expected, rtol=0, atol=1e-14)
    assert expected.abs().max() > 1e-4


@pytest.mark.parametrize("mean", ["previous", "same_batch"])
def test_corrected_terms_divide_by_the_temperature_and_the_mean_has_no_gradient(mean):
    logits = random_logits(3, T, E)
    correction = LogitCorrection(E, tau=0.8, beta=0.5, temperature=1.7, mean_from=mean)
    one_step(correction, route(random_logits(4, 30, E), 1))
    terms = TwoLevelTerms(E, EQUAL, intra="global", inter="selected", source="corrected")
    shift = correction.mean_logits.double()
    if mean == "same_batch":
        shift = 0.5 * shift + 0.5 * logits.mean(0)
    p = ((logits - 0.8 * shift) / 1.7).softmax(-1)
    sel = torch.zeros_like(p).scatter(1, p.view(T, 4, 2).argmax(-1) + torch.arange(0, E, 2), 1.0)
    expected = 0.01 * (d_inter_selected(p, EQUAL, sel) - d_intra_global(p, EQUAL, None)) / 1.7 / T
    found = gradient(Chain(correction, terms), logits, groups=EQUAL)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)  # the stored mean is fp32


@pytest.mark.parametrize("k", [1, 3])
def test_gradient_of_switch(k):
    logits = random_logits(5, T, E)
    p, f = logits.softmax(-1), torch.bincount(route(logits, k).expert_ids.flatten(), minlength=E) / (k * T)
    expected = 0.4 * E / T * p * (f - (p * f).sum(-1, keepdim=True))
    assert torch.allclose(gradient(Switch(weight=0.4), logits, k), expected, rtol=0, atol=1e-8)
    assert torch.allclose(gradient(Switch(weight=0.4, source="raw"), logits, k), expected, rtol=0, atol=1e-8)


def test_gradient_of_switch_on_normalised_sigmoid_scores():
    logits = random_logits(6, T, E)
    f = torch.bincount(route(logits, 2).expert_ids.flatten(), minlength=E).double() / (2 * T)
    s = logits.sigmoid()
    total = s.sum(-1, keepdim=True)
    expected = 0.4 * E / T * (f - (f * s).sum(-1, keepdim=True) / total) / total * s * (1 - s)
    assert torch.allclose(gradient(Switch(weight=0.4), logits, 2, score="sigmoid"), expected, rtol=0, atol=1e-14)


def test_gradient_of_the_z_loss():
    logits = random_logits(7, T, E)
    expected = 0.2 * 2 / T * logits.logsumexp(-1, keepdim=True) * logits.softmax(-1)
    assert torch.allclose(gradient(ZLoss(weight=0.2), logits), expected, rtol=0, atol=1e-14)


def test_gradient_under_dual_ascent_uses_the_multipliers():
    logits, p = random_logits(8, T, E), random_logits(8, T, E).softmax(-1)
    dual = DualAscent(TwoLevelTerms(E, EQUAL), epsilon_inter=0.5, epsilon_intra=0.4)
    dual.multipliers.copy_(torch.tensor([0.25, 0.5]))
    expected = (0.5 * d_inter_dense(p, EQUAL, None) - 0.25 * d_intra_group_conditional(p, EQUAL, None)) / T
    assert torch.allclose(gradient(dual, logits, groups=EQUAL), expected, rtol=0, atol=1e-14)


def test_the_gate_gets_the_gradient_of_its_logits_times_the_tokens():
    x = random_logits(9, T, 5)
    gate = Gate(5, E).double()
    logits = gate(x)
    terms = TwoLevelTerms(E, EQUAL, lambda_intra=0.0, lambda_inter=0.7)
    routing = route(logits, 1, groups=EQUAL)
    (found,) = torch.autograd.grad(terms.losses(routing)["inter"], gate.weight)
    expected = (0.7 * d_inter_dense(logits.softmax(-1), EQUAL, None) / T).T @ x
    assert torch.allclose(found, expected, rtol=0, atol=1e-13)
