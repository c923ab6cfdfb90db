"""`aux_losses`, `observe`, `step`: per layer, by type, in order, once."""

import pytest
import torch
from small_layers import D, E, Residual, make_moe, make_router, tokens
from torch import nn

from himoe import Balancer, MoE, SwiGLUExperts, aux_losses, moe_layers, observe, step
from himoe.errors import ConfigError


def forward(model, x):
    """Run all MoE layers in order, as a model that returns its routings does."""
    routings = []
    for layer in moe_layers(model):
        y, routing = layer(x)
        x = x + y
        routings.append(routing)
    return x, routings


def states(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def favour(moe, expert):
    """Let the gate send every positive token to one expert."""
    with torch.no_grad():
        moe.router.gate.weight.zero_()[expert] = 10.0


def test_losses_are_per_layer_then_summed():
    one, two = make_moe("switch"), make_moe("switch", seed=1)
    favour(one, 0)
    favour(two, 1)
    x = tokens(16).abs()
    routings = [one(x)[1], two(x)[1]]
    separate = [layer.router.balancer.losses(r)["load_balance"] for layer, r in zip((one, two), routings, strict=True)]
    total = aux_losses(nn.ModuleList([one, two]), routings)
    # opposite imbalance does not cancel: each layer scores E·α, and pooled counts would give half of it
    assert [s.item() for s in separate] == pytest.approx([E * 0.01] * 2, rel=1e-3)
    torch.testing.assert_close(total, {"load_balance": separate[0] + separate[1]})


def test_every_name_of_every_layer_is_summed():
    model = nn.ModuleList([make_moe("hi_moe", z_loss=0.1), make_moe("switch", seed=1), make_moe("loss_free", seed=2)])
    _, routings = forward(model, tokens(10))
    total = aux_losses(model, routings)
    parts = [layer.router.balancer.losses(r) for layer, r in zip(model, routings, strict=True)]
    assert total.keys() == {"load_balance", "intra", "inter", "z_loss"}
    for name, value in total.items():
        torch.testing.assert_close(value, sum(part[name] for part in parts if name in part))
    assert all(not name_values for name_values in parts[2:])


def test_auxiliary_losses_train_the_gates():
    model = nn.ModuleList([make_moe(), make_moe(seed=1)])
    _, routings = forward(model, tokens(10))
    sum(aux_losses(model, routings).values()).backward()
    assert all(layer.router.gate.weight.grad.abs().sum() > 0 for layer in model)
    assert all(layer.experts.down_proj.grad is None for layer in model[1:])


def test_layers_are_found_by_type_wherever_they_stand():
    a, b, c = (make_moe(seed=i) for i in range(3))

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(D, D)
            self.mlp = nn.ModuleDict({"x": nn.Sequential(nn.Identity(), a)})
            self.second_name_of_a = a
            self.deep = Residual(b)
            self.register_module("z", c)

    assert moe_layers(Odd()) == [a, b, c]
    assert moe_layers(a) == [a]
    assert moe_layers(nn.Linear(2, 2)) == []


def test_a_subclass_of_the_layer_is_a_layer():
    class Mine(MoE):
        pass

    mine = Mine(make_router(), SwiGLUExperts(E, D, 12))
    assert moe_layers(nn.Sequential(mine)) == [mine]


def test_a_model_without_experts_has_no_losses():
    model = nn.Linear(2, 2)
    assert aux_losses(model, []) == {}
    observe(model, [])
    step(model)


@pytest.mark.parametrize("call", [aux_losses, observe])
def test_routings_that_do_not_belong_are_refused(call):
    model = nn.ModuleList([make_moe(), make_moe(num_experts=12)])
    _, routings = forward(model, tokens(4))
    with pytest.raises(ConfigError, match="1 routings for 2 MoE layers: pass one per layer, in layer order"):
        call(model, routings[:1])
    with pytest.raises(ConfigError, match="3 routings for 2 MoE layers"):
        call(model, [*routings, routings[0]])
    with pytest.raises(
        Exception, match="routing 0 has 12 experts, MoE layer 0 has 8: pass the routings in layer order"
    ):
        call(model, routings[::-1])


def test_a_layer_that_did_not_run_is_left_out():
    model = nn.ModuleList([make_moe("loss_free"), make_moe("loss_free", seed=1)])
    _, routings = forward(model, tokens(10))
    before = states(model)
    assert aux_losses(model, [None, None]) == {}
    observe(model, [None, routings[1]])
    step(model)
    after = states(model)
    assert torch.equal(before["0.router.balancer.bias"], after["0.router.balancer.bias"])
    assert not torch.equal(before["1.router.balancer.bias"], after["1.router.balancer.bias"])


def test_eval_is_neither_observed_nor_refused():
    model = nn.ModuleList([make_moe("loss_free"), make_moe("hi_moe", seed=1)]).eval()
    before = states(model)
    with torch.no_grad():
        _, routings = forward(model, tokens(10))
    assert aux_losses(model, routings)["load_balance"] > 0
    observe(model, routings)
    step(model)
    after = states(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_observe_collects_and_only_step_moves():
    model = nn.ModuleList([make_moe("loss_free"), make_moe("hi_moe", seed=1)])
    before = states(model)
    for seed in range(3):
        observe(model, forward(model, tokens(10, seed=seed))[1])
    assert all(torch.equal(before[n], b) for n, b in model.named_buffers())
    step(model)
    moved = states(model)
    assert all(not torch.equal(before[n], moved[n]) for n in before)
    step(model)  # nothing observed since: nothing moves, however often it is called
    assert all(torch.equal(moved[n], b) for n, b in model.named_buffers())


def test_micro_batches_add_up_to_one_batch():
    whole, parts = (nn.ModuleList([make_moe("loss_free"), make_moe("hi_moe", seed=1)]) for _ in range(2))
    x = tokens(24)
    observe(whole, forward(whole, x)[1])
    for micro_batch in x.split([5, 1, 18]):
        observe(parts, forward(parts, micro_batch)[1])
    step(whole)
    step(parts)
    for (name, one), (_, other) in zip(whole.named_buffers(), parts.named_buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_observing_keeps_no_graph():
    model = make_moe("hi_moe")
    _, routing = model(tokens(10))
    for _ in range(2):
        observe(model, [routing])
    sums = [s for m in model.modules() if isinstance(m, Balancer) for s in m.sums.values()]
    assert sums and not any(s.requires_grad for s in sums)


def test_a_routing_without_gradient_is_refused_where_it_would_train_nothing():
    moe = make_moe()
    with torch.no_grad():
        _, routing = moe(tokens(4))
        aux_losses(moe, [routing])  # nothing is trained here
    with pytest.raises(ConfigError, match=r"MoE layer 0 carry no gradient.*use_reentrant=False"):
        aux_losses(moe, [routing])


def test_a_frozen_gate_is_no_mistake():
    moe = make_moe()
    moe.router.gate.requires_grad_(False)
    _, routing = moe(tokens(4))
    assert not aux_losses(moe, [routing])["load_balance"].requires_grad
