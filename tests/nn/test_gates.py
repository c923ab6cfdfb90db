"""The noisy and the cosine gate: their formulas by hand, the router's noise, and what the optimizer does with them."""

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from himoe import DecoderLM, MoE, Router, SwiGLUExperts
from himoe.errors import ConfigError
from himoe.functional.selection import top_k
from himoe.nn import CosineGate, NoisyGate
from himoe.train.optimizer import build_optimizer

D, E = 6, 5


def tokens(count=7, seed=0):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def drawn(gate, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return gate


def test_noise_is_softplus_of_a_second_matrix_above_a_floor():
    gate, x = drawn(NoisyGate(D, E, noise_floor=0.5)), tokens()
    torch.testing.assert_close(gate(x), x @ gate.weight.T)
    for t in range(7):
        for e in range(E):
            by_hand = math.log1p(math.exp((x[t] @ gate.noise_weight[e]).item())) + 0.5
            assert gate.noise_std(x)[t, e].item() == pytest.approx(by_hand, rel=1e-5)
    paper = NoisyGate(D, E, noise_floor=0)
    torch.testing.assert_close(paper.noise_std(x), torch.full((7, E), math.log(2)))


def test_the_noisy_gate_starts_without_signal_and_with_some_noise():
    gate = NoisyGate(D, E)
    assert (gate(tokens()) == 0).all()
    torch.testing.assert_close(gate.noise_std(tokens()), torch.full((7, E), math.log(2) + 0.01))
    router = Router(gate, partial(top_k, k=2), num_experts=E)
    torch.manual_seed(0)
    routing = router(tokens(4000))
    load = torch.bincount(routing.expert_ids.flatten(), minlength=E)
    assert (load - 1600).abs().max() < 5 * 1600**0.5  # noise alone decides, so evenly


def test_the_router_adds_noise_in_training_only_and_hands_it_on():
    gate = drawn(NoisyGate(D, E))
    router, x = Router(gate, partial(top_k, k=2), num_experts=E), tokens(5000)
    torch.manual_seed(0)
    routing = router(x)
    noise, std = routing.context.noise, routing.context.noise_std
    torch.testing.assert_close(routing.logits, gate(x))
    torch.testing.assert_close(routing.scores, (gate(x) + noise).softmax(-1))
    torch.testing.assert_close(std, gate.noise_std(x))
    unit = noise / std
    assert unit.mean().item() == pytest.approx(0, abs=0.03) and unit.std().item() == pytest.approx(1, abs=0.03)
    (grad,) = torch.autograd.grad(routing.weights[:, 0].sum(), gate.noise_weight)
    assert grad.abs().sum() > 0
    calm = router.eval()(x)
    assert calm.context.noise is None and calm.context.noise_std is None
    torch.testing.assert_close(calm.scores, gate(x).softmax(-1))


def test_the_cosine_gate_by_hand():
    gate, x = drawn(CosineGate(D, E, proj_dim=3, min_temperature=0.05)), tokens()
    temperature = 0.05 + math.exp(gate.log_temperature.item())
    for t in range(7):
        token = gate.projection @ x[t]
        for e in range(E):
            cosine = (token @ gate.weight[e]) / token.norm() / gate.weight[e].norm()
            assert gate(x)[t, e].item() == pytest.approx(cosine.item() / temperature, rel=1e-4, abs=1e-5)


def test_the_cosine_gate_knows_directions_only():
    gate, x = CosineGate(D, E), tokens()
    torch.testing.assert_close(gate(1000 * x), gate(x))
    with torch.no_grad():
        gate.weight[2] *= 50
    torch.testing.assert_close(gate(x), gate(7 * x))
    assert gate(x).abs().max() <= 1 / 0.3 + 1e-5


def test_the_temperature_starts_where_it_is_told_and_never_passes_its_minimum():
    gate, x = CosineGate(D, E, temperature=0.7, min_temperature=0.2), tokens()
    cosine = F.cosine_similarity((x @ gate.projection.T)[:, None], gate.weight[None], dim=-1)
    torch.testing.assert_close(gate(x), cosine / 0.7)
    with torch.no_grad():
        gate.log_temperature.fill_(-50.0)
    torch.testing.assert_close(gate(x), cosine / 0.2)


def test_the_cosine_gate_takes_a_token_of_zeros():
    gate, x = CosineGate(D, E), torch.zeros(2, D, requires_grad=True)
    logits = gate(x)
    logits.sum().backward()
    assert (logits == 0).all() and x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoisyGate(D, E, noise_floor=-0.1), r"noise_floor = -0\.1 must be ≥ 0 and finite"),
        (lambda: CosineGate(D, E, proj_dim=0), "proj_dim = 0 must be ≥ 1"),
        (lambda: CosineGate(D, E, temperature=0.01), r"temperature = 0\.01 must be above min_temperature = 0\.01"),
        (lambda: CosineGate(D, E, min_temperature=0.0), r"min_temperature = 0\.0, and that above 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_spares_the_learned_temperature_and_muon_leaves_gates_alone(optimizer):
    def layer(index):
        gate = CosineGate(16, 4) if index else NoisyGate(16, 4)
        return MoE(Router(gate, partial(top_k, k=2), num_experts=4), SwiGLUExperts(4, 16, 8))

    model = DecoderLM(vocab_size=9, dim=16, num_layers=2, num_heads=2, feed_forward=layer)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay, by_muon = {}, set()
    for group in build_optimizer(model, 1e-3, optimizer=optimizer, weight_decay=0.1).param_groups:
        for parameter in group["params"]:
            decay[names[parameter]] = group["weight_decay"]
            if group.get("rows") is not None:
                by_muon.add(names[parameter])
    gates = {name: value for name, value in decay.items() if ".gate." in name}
    assert {name.rpartition(".")[2]: value for name, value in gates.items()} == {
        "weight": 0.1,
        "noise_weight": 0.1,
        "projection": 0.1,
        "log_temperature": 0.0,
    }
    assert not by_muon & gates.keys()
    assert model.blocks[1].feed_forward.router.gate.log_temperature.item() == pytest.approx(math.log(0.29))
