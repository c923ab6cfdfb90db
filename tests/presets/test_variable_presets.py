"""`remoe` and `expert_choice`: tokens with as many experts as they want, or as want them."""

import pytest
import torch
from tiny_recipe import config
from tiny_recipe import router as router_of

from himoe import MoE, SwiGLUExperts, presets
from himoe.balance import ReluSparsity, step_balancers
from himoe.build import build_model
from himoe.errors import ConfigError
from himoe.nn import non_causal_parts
from himoe.testing import check_balancer

D, E = 6, 8


def tokens(seed=0, count=40):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def test_remoe_uses_the_experts_with_a_positive_logit_and_the_logit_weighs_them():
    router = presets.remoe(D, E, 2)
    layer = MoE(router, SwiGLUExperts(E, D, 5)).double()
    x = tokens().double().requires_grad_()
    y, routing = layer(x)
    logits = x @ router.gate.weight.T
    assert torch.equal(routing.selected.sum(-1), (logits > 0).sum(-1))
    gate_up, down = layer.experts.gate_up_proj, layer.experts.down_proj
    by_hand = torch.zeros_like(y)
    for e in range(E):  # every expert computes every token: ReLU alone switches it off
        gate, value = (x @ gate_up[e].T).chunk(2, dim=-1)
        by_hand = by_hand + logits[:, e : e + 1].relu() * ((torch.nn.functional.silu(gate) * value) @ down[e].T)
    torch.testing.assert_close(y, by_hand)
    ours = torch.autograd.grad(y.square().sum(), [x, router.gate.weight, gate_up, down])
    theirs = torch.autograd.grad(by_hand.square().sum(), [x, router.gate.weight, gate_up, down])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_remoe_comes_to_k_experts_on_average():
    torch.manual_seed(0)
    router = presets.remoe(D, E, 2, start=1e-3)
    optimizer = torch.optim.SGD([router.gate.weight], lr=0.05)
    x = tokens(count=256)
    x[:, 0] = 1  # tokens in common, or half of the logits would be positive whatever the gate
    means = []
    for _ in range(300):
        routing = router(x)
        loss = -routing.weights.sum(-1).log1p().mean() + sum(router.balancer.losses(routing).values())
        optimizer.zero_grad()
        loss.backward()
        router.balancer.observe(routing)
        optimizer.step()
        step_balancers([router.balancer])
        means.append(routing.selected.sum(-1).float().mean().item())
    assert means[0] > 3
    assert sum(means[-100:]) / 100 == pytest.approx(2, abs=0.2)


def test_remoe_passes_its_options_on_and_conforms():
    router = presets.remoe(D, E, 3, max_k=4, start=0.5, factor=1.5, balance=False)
    assert isinstance(router.balancer, ReluSparsity) and not router.renormalize
    assert (router.balancer.top_k, router.balancer.start, router.balancer.factor) == (3, 0.5, 1.5)
    assert not router.balancer.balance and router.top_k == 4
    usual = presets.remoe(D, E, 3)
    assert (usual.balancer.start, usual.balancer.factor, usual.balancer.balance, usual.top_k) == (1e-8, 1.2, True, E)
    check_balancer(lambda: presets.remoe(D, E, 2).balancer, num_experts=E)


def test_every_expert_takes_its_best_tokens_weighed_by_their_probability():
    router = presets.expert_choice(D, E, 2)
    routing = router(tokens())
    p = routing.logits.softmax(-1)
    taken = torch.zeros(40, E, dtype=torch.bool)
    for e in range(E):
        taken[p[:, e].topk(40 * 2 // E).indices, e] = True
    found = torch.zeros(40, E, dtype=torch.bool).scatter(1, routing.expert_ids, routing.selected)
    assert torch.equal(found, taken)
    weights = torch.zeros(40, E).scatter_add(1, routing.expert_ids, routing.weights)
    torch.testing.assert_close(weights, p * taken)
    assert non_causal_parts(MoE(router, SwiGLUExperts(E, D, 5))) and not router.balancer.losses(routing)
    assert presets.expert_choice(D, E, 2, max_k=3)(tokens()).expert_ids.shape == (40, 3)


@pytest.mark.parametrize("name", ["remoe", "expert_choice"])
def test_padding_changes_no_token_and_no_gradient(name):
    layer = MoE(getattr(presets, name)(D, E, 2), SwiGLUExperts(E, D, 5)).double()
    real, padding = tokens(count=17).double(), 5 * tokens(1, 6).double()
    mask = torch.tensor([True] * 9 + [False] * 6 + [True] * 8)
    results = []
    for x, m in ((real, None), (torch.cat([real[:9], padding, real[9:]]), mask)):
        layer.zero_grad()
        y, routing = layer(x, m)
        y = y if m is None else y[m]
        (y.square().sum() + sum(layer.router.balancer.losses(routing).values())).backward()
        results.append([y, *(parameter.grad.clone() for parameter in layer.parameters())])
        assert m is None or not routing.selected[~m].any()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    alone, routing = layer(real[:1])
    assert alone.isfinite().all() and routing.kept.any() == (name == "expert_choice" or routing.logits.max() > 0)


@pytest.mark.parametrize("name", ["remoe", "expert_choice"])
def test_they_are_built_from_a_configuration_and_k_is_checked(name):
    built = router_of(preset=name, top_k=2, options={"max_k": 5})
    assert built.top_k == 5
    for top_k in (0, E + 1):
        with pytest.raises(ConfigError, match=f"top_k = {top_k} must be between 1 and num_experts = {E}"):
            getattr(presets, name)(D, E, top_k)


def test_a_language_model_refuses_the_one_that_is_not_causal():
    build_model(config(preset="remoe", top_k=2), 300)
    with pytest.raises(ConfigError, match=r"expert_choice.*causal"):
        build_model(config(preset="expert_choice", top_k=2), 300)
