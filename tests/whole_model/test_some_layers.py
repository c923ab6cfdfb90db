"""Experts in only some layers, balancing in only some of them; layers are found by type."""

import pytest
import torch
from router_zoo import E, loss_of, make_model, make_router, optimizer_step, state_of, token_ids
from torch import nn

import himoe
from himoe import Balancer, MoE, MoEAdapter, SwiGLUExperts

D = 8


@pytest.mark.parametrize("layers", [(), (0,), (1,), (0, 1)])
def test_any_layers_may_have_experts(layers):
    model = make_model("everything", layers=layers)
    loss, routings = loss_of(model, token_ids())
    loss.backward()
    assert len(routings) == len(layers) and model.moe_layer_indices() == list(layers)
    assert bool(himoe.aux_losses(model, routings)) == bool(layers)
    optimizer_step(model, token_ids())  # no layer, no balancer: nothing to do, nothing to fail
    assert bool(state_of(model)) == bool(layers)


def test_balancing_may_be_off_in_some_layers():
    both, one = make_model("everything"), make_model("everything")
    himoe.moe_layers(one)[0].router.balancer = Balancer()
    loss_of(one, token_ids())[0].backward()
    optimizer_step(one, token_ids())
    assert len(state_of(one)) * 2 == len(state_of(both))
    assert all(name.startswith("blocks.1.") for name in state_of(one))
    _, routings = one(token_ids())
    alone = himoe.moe_layers(one)[1].router.balancer.losses(routings[1])
    total = himoe.aux_losses(one, routings)
    assert {k: v.item() for k, v in total.items()} == pytest.approx({k: v.item() for k, v in alone.items()})


class Somebody(nn.Module):
    """Names that nothing could guess, one layer inside a list inside a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_of_the_garden = nn.Linear(D, D)  # not a gate
        self.stuff = nn.ModuleDict(
            {"mlp": nn.ModuleList([MoEAdapter(MoE(make_router("switch"), SwiGLUExperts(E, D, 4)))])}
        )
        self.x1 = MoE(make_router("loss_free"), SwiGLUExperts(E, D, 4))

    def forward(self, x):
        x = x + self.stuff["mlp"][0](self.gate_of_the_garden(x))
        y, self.last = self.x1(x)
        return y


def test_layers_are_found_by_type_whatever_their_names():
    model = Somebody()
    assert himoe.moe_layers(model) == [model.stuff["mlp"][0].moe, model.x1]
    with himoe.collect_routings(model) as routings:
        model(torch.randn(12, D)).sum()
    routings[1] = model.last
    assert set(himoe.aux_losses(model, routings)) == {"load_balance"}
    himoe.observe(model, routings)
    himoe.step(model)
    assert model.x1.router.balancer.bias.any()
