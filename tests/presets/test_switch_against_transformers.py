"""`switch_transformers` against transformers' sparse MLP with the same weights, without and with dropped tokens."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers.models.switch_transformers.configuration_switch_transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from himoe import Capacity, GELUExperts, MoE, presets
from himoe.nn import ReLUExperts

ROWS, LENGTH, D, F, E = 3, 10, 6, 7, 5
EXPERTS = {"relu": ReLUExperts, "gelu": GELUExperts}  # relu is the published one


def make_block(places: int, activation: str, seed: int) -> SwitchTransformersSparseMLP:
    config = SwitchTransformersConfig(
        d_model=D, d_ff=F, num_experts=E, expert_capacity=places, dense_act_fn=activation, dropout_rate=0.0,
        router_jitter_noise=0.0,
    )  # fmt: skip
    block = SwitchTransformersSparseMLP(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(parameter.shape[-1] ** -0.5 * torch.randn(parameter.shape, generator=generator))
        block.router.classifier.weight.mul_(3)
    return block


def our_layer(block: SwitchTransformersSparseMLP, activation: str, dispatcher=None) -> MoE:
    layer = MoE(presets.switch_transformers(D, E, 1), EXPERTS[activation](E, D, F), dispatcher=dispatcher)
    layer.router.gate.weight.data = block.router.classifier.weight.detach().clone()
    experts = [block.experts[f"expert_{e}"] for e in range(E)]
    layer.experts.up_proj.data = torch.stack([expert.wi.weight for expert in experts]).detach()
    layer.experts.down_proj.data = torch.stack([expert.wo.weight for expert in experts]).detach()
    return layer


def grad_of(block: SwitchTransformersSparseMLP, name: str) -> torch.Tensor:
    """The experts' gradients in one tensor; an expert without tokens has none."""
    weights = [getattr(block.experts[f"expert_{e}"], name).weight for e in range(E)]
    return torch.stack([torch.zeros_like(w) if w.grad is None else w.grad for w in weights])


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    x, direction = torch.randn(2, ROWS, LENGTH, D, generator=generator)
    return x + 0.4, direction  # a common part, so that some experts are favoured


@pytest.mark.parametrize("activation", list(EXPERTS))
@pytest.mark.parametrize("places", [LENGTH, 3, 1])
@pytest.mark.parametrize("seed", range(3))
def test_routing_output_and_gradients_are_theirs(seed, places, activation):
    """Their places are those of one sequence, so ours, which are those of a batch, are compared row by row."""
    block = make_block(places, activation, seed)
    layer = our_layer(block, activation, Capacity(places * E / LENGTH))
    x, direction = batch(seed)
    their_x, our_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    theirs = block(their_x)
    (theirs * direction).sum().backward()
    rows = [layer(row[None]) for row in our_x]
    ours = torch.cat([y for y, _ in rows])
    (ours * direction).sum().backward()
    with torch.no_grad():
        kept, probability, _ = block.router(x)
    for row, (_, routing) in enumerate(rows):
        assert torch.equal(routing.kept[:, 0], kept[row].sum(-1) == 1)
        assert torch.equal(routing.expert_ids[routing.kept], kept[row].argmax(-1)[routing.kept[:, 0]])
        torch.testing.assert_close(routing.weights, probability[row])
    dropped = kept.sum(-1) == 0
    assert dropped.any() == (places < LENGTH)
    assert (theirs[dropped] == 0).all()
    assert (ours[dropped] == 0).all()
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ours, theirs, **close)
    torch.testing.assert_close(our_x.grad, their_x.grad, **close)
    torch.testing.assert_close(layer.router.gate.weight.grad, block.router.classifier.weight.grad, **close)
    torch.testing.assert_close(layer.experts.up_proj.grad, grad_of(block, "wi"), **close)
    torch.testing.assert_close(layer.experts.down_proj.grad, grad_of(block, "wo"), **close)
    assert layer.router.gate.weight.grad.abs().max() > 1e-2


@pytest.mark.parametrize("activation", list(EXPERTS))
def test_without_a_limit_a_whole_batch_is_theirs(activation):
    block = make_block(LENGTH, activation, 0)
    x, _ = batch(0)
    torch.testing.assert_close(our_layer(block, activation)(x)[0], block(x), rtol=1e-5, atol=1e-5)


def test_evaluation_drops_as_theirs_only_where_it_is_asked_to():
    block = make_block(3, "relu", 0).eval()
    x, _ = batch(0)
    dropping = our_layer(block, "relu", Capacity(3 * E / LENGTH, drop_in_eval=True)).eval()
    usual = our_layer(block, "relu", Capacity(3 * E / LENGTH)).eval()
    torch.testing.assert_close(dropping(x[:1])[0], block(x[:1]), rtol=1e-5, atol=1e-5)
    assert usual(x[:1])[1].kept.all()
