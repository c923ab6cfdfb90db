"""`MoEAdapter` in others' blocks: its routing arrives once per forward pass, in layer order, never on recompute."""

import pytest
import torch
from small_layers import Residual, make_moe, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from himoe import MoEAdapter, aux_losses, collect_routings, moe_layers
from himoe.errors import ConfigError


def test_the_adapter_returns_the_output_alone():
    moe = make_moe()
    x, mask = tokens(2, 3), torch.tensor([[True, True, False], [True, False, False]])
    assert torch.equal(MoEAdapter(moe)(x), moe(x)[0])
    assert torch.equal(MoEAdapter(moe)(x, mask), moe(x, mask)[0])


def test_routings_arrive_in_layer_order_whatever_the_order_of_the_run():
    model = Residual(make_moe(num_experts=8), make_moe(num_experts=12), make_moe(num_experts=16))
    x = tokens(3)
    with collect_routings(model) as routings:
        for layer in reversed(model.layers):
            layer(x)
    assert [r.num_experts for r in routings] == [8, 12, 16]
    assert [layer.router.num_experts for layer in moe_layers(model)] == [8, 12, 16]


def test_layers_that_do_not_run_leave_none():
    model = Residual(make_moe(), make_moe(seed=1), make_moe(seed=2))
    with collect_routings(model) as routings:
        y = model.layers[1](tokens(3))
    assert [r is None for r in routings] == [True, False, True]
    (y.sum() + sum(aux_losses(model, routings).values())).backward()
    gates = [layer.router.gate.weight.grad for layer in moe_layers(model)]
    assert gates[0] is None and gates[1] is not None and gates[2] is None


def test_a_second_forward_pass_needs_a_second_context():
    model = Residual(make_moe(), make_moe(seed=1))
    with (
        collect_routings(model),
        pytest.raises(ConfigError, match=r"MoE layer 0 ran twice.*one for every forward pass"),
    ):
        model(tokens(3))
        model(tokens(3))
    for _ in range(2):
        with collect_routings(model) as routings:
            model(tokens(3))
        assert None not in routings


def test_nothing_is_collected_outside():
    model = Residual(make_moe())
    with collect_routings(model) as routings:
        pass
    model(tokens(3))
    assert routings == [None]


def test_an_error_inside_closes_the_context():
    model = Residual(make_moe())
    with pytest.raises(ValueError, match="mine"), collect_routings(model):
        model(tokens(3))
        raise ValueError("mine")
    model(tokens(3))  # would raise "ran twice" if the context were still open


def test_a_model_without_experts_is_named():
    with (
        pytest.raises(ConfigError, match="collect_routings: Linear has no MoE layer"),
        collect_routings(nn.Linear(2, 2)),
    ):
        pass


def test_two_models_in_nested_contexts_get_their_own():
    teacher, student = Residual(make_moe(num_experts=12)), Residual(make_moe())
    x = tokens(3)
    with collect_routings(teacher) as of_teacher, collect_routings(student) as of_student:
        teacher(x)
        student(x)
    assert [r.num_experts for r in of_teacher] == [12]
    assert [r.num_experts for r in of_student] == [8]


def test_a_model_that_nobody_asked_about_is_ignored():
    model, other = Residual(make_moe()), Residual(make_moe(seed=1))
    with collect_routings(model) as routings:
        other(tokens(3))
        model(tokens(3))
        other(tokens(3))
    assert routings[0] is not None


@pytest.mark.parametrize("backward", ["inside", "outside"])
def test_recomputing_hands_over_nothing(backward):
    model = Residual(make_moe(), make_moe(seed=1))
    x = tokens(2, 5).requires_grad_()
    calls = [0]
    moe_layers(model)[0].register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))

    def loss(routings):
        return y.square().sum() + sum(aux_losses(model, routings).values())

    with collect_routings(model) as routings:
        y = checkpoint(model, x, use_reentrant=False)
        first = list(routings)
        if backward == "inside":
            loss(routings).backward()
    if backward == "outside":
        loss(routings).backward()
    assert calls == [2]  # forward and recompute did run
    assert all(a is b for a, b in zip(first, routings, strict=True))
    assert all(layer.router.gate.weight.grad.any() for layer in moe_layers(model))


def test_reentrant_checkpointing_is_refused_rather_than_training_nothing():
    model = Residual(make_moe())
    x = tokens(2, 5).requires_grad_()
    with collect_routings(model) as routings:
        checkpoint(model, x, use_reentrant=True)
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        aux_losses(model, routings)
