"""The auxiliary losses of presets against those of transformers v5: value, gradient, and the factor between them."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers.models.mixtral import modeling_mixtral
from transformers.models.olmoe import modeling_olmoe
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.models.switch_transformers import modeling_switch_transformers as modeling_switch

from himoe import MoE, SwiGLUExperts, Switch, ZLoss, aux_losses, moe_layers, presets
from himoe.balance import SequenceBalance

ROWS, LENGTH, D, E = 3, 7, 6, 5
PADDED = torch.tensor([[True] * 7, [True] * 4 + [False] * 3, [False] * 7])
PUBLISHED = {
    "olmoe": (presets.olmoe, modeling_olmoe, 0.01, 1e-3),
    "mixtral": (presets.mixtral, modeling_mixtral, 0.02, 0.0),
    "qwen3_moe": (presets.qwen3_moe, modeling_qwen3_moe, 0.001, 0.0),
}


def layer_and_routing(router, mask=None, seed=0):
    layer = MoE(router, SwiGLUExperts(E, D, 3)).double()
    generator = torch.Generator().manual_seed(seed)
    layer.router.gate.weight.data = torch.randn(E, D, generator=generator, dtype=torch.float64)
    x = torch.randn(ROWS, LENGTH, D, generator=generator, dtype=torch.float64) + 0.5
    return layer, layer(x, mask)[1]


def check_same(ours, theirs, parameter):
    """Equal values and gradients; the gradient is none that could be missing."""
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-5, atol=1e-8)
    (our_grad,) = torch.autograd.grad(ours, parameter, retain_graph=True)
    (their_grad,) = torch.autograd.grad(theirs, parameter, retain_graph=True)
    assert their_grad.abs().max() > 1e-5
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("name", list(PUBLISHED))
def test_a_published_weight_is_k_times_as_large_with_f_summing_to_one(name, top_k, mask, seed):
    preset, modeling, published, z_weight = PUBLISHED[name]
    layer, routing = layer_and_routing(preset(D, E, top_k), mask, seed)
    logits = routing.logits
    theirs = published * modeling.load_balancing_loss_func((logits,), E, top_k, mask)
    if z_weight:
        real = logits if mask is None else logits[mask.flatten()]
        theirs = theirs + z_weight * modeling_switch.router_z_loss_func(real[None])
    check_same(sum(aux_losses(layer, [routing]).values()), theirs, layer.router.gate.weight)


def test_a_weight_of_ones_own_is_taken_as_it_is():
    for preset, modeling, _, _ in PUBLISHED.values():
        layer, routing = layer_and_routing(preset(D, E, 2, alpha=0.3))
        ours = sum(value for name, value in aux_losses(layer, [routing]).items() if name != "z_loss")
        check_same(ours, 0.3 / 2 * modeling.load_balancing_loss_func((routing.logits,), E, 2), layer.router.gate.weight)


def test_opposite_layers_cancel_in_their_mean_over_layers_and_add_up_in_ours():
    """Experts 0 and 1 with probabilities .9 and .1, everybody's choice is 0 in one layer and 1 in the other."""
    model = torch.nn.ModuleList(MoE(presets.mixtral(2, 2, 1, alpha=1.0), SwiGLUExperts(2, 2, 3)) for _ in range(2))
    log_odds = torch.tensor(9.0).log()
    for sign, layer in zip((1, -1), moe_layers(model), strict=True):
        layer.router.gate.weight.data = torch.tensor([[sign * log_odds, 0.0], [0.0, 0.0]])
    routings = [layer(torch.tensor([[1.0, 0.0]]).repeat(4, 1))[1] for layer in moe_layers(model)]
    theirs = modeling_mixtral.load_balancing_loss_func(tuple(r.logits for r in routings), 2, 1)
    assert theirs.item() == pytest.approx(1.0)  # 2·(1/2·1/2 + 1/2·1/2), as if it were balanced
    assert sum(aux_losses(model, routings).values()).item() == pytest.approx(2 * 1.8)  # 2·(1·.9) in each


@pytest.mark.parametrize("seed", range(2))
def test_the_losses_of_switch_transformers_are_those_within_sequences_and_the_z_loss(seed):
    layer, routing = layer_and_routing(presets.switch_transformers(D, E, 1), seed=seed)
    logits = routing.logits.view(ROWS, LENGTH, E)
    balance = modeling_switch.load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1))
    z_loss = modeling_switch.router_z_loss_func(logits)
    config = modeling_switch.SwitchTransformersConfig()
    assert (config.router_aux_loss_coef, config.router_z_loss_coef) == (1e-3, 1e-3)  # the preset's defaults
    check_same(sum(aux_losses(layer, [routing]).values()), 1e-3 * (balance + z_loss), layer.router.gate.weight)
    check_same(SequenceBalance(weight=1.0).losses(routing)["sequence_balance"], balance, layer.router.gate.weight)
    check_same(ZLoss(weight=1.0).losses(routing)["z_loss"], z_loss, layer.router.gate.weight)


def test_over_one_sequence_the_loss_of_switch_transformers_is_that_of_the_switch_paper():
    layer, routing = layer_and_routing(presets.switch(D, E, 1))
    logits = routing.logits[None]
    theirs = modeling_switch.load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1))
    check_same(Switch(weight=1.0).losses(routing)["load_balance"], theirs, layer.router.gate.weight)
    assert presets.switch(D, E, 1).balancer.parts[0].weight == 0.01  # no factor at K = 1
