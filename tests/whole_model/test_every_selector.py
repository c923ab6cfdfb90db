"""Whole language models with every selector: padding, recompute, and independence from the rest of the batch."""

import inspect
from functools import partial

import pytest
import torch

import himoe
from himoe import DecoderLM, Groups, MoE, Router, SwiGLUExperts, Switch, registry
from himoe.functional import scores
from himoe.nn import CosineGate, Gate, NoisyGate
from himoe.train.randomness import seed_noise

V, D, E = 17, 8, 8
SELECTORS = [name for name in registry.SELECTORS if name != "replay"]
BY_THEMSELVES = [name for name in SELECTORS if name not in ("expert_choice", "sinkhorn", "round_robin")]
OPTIONS = {"top_p": {"p": 0.7, "max_k": 5}, "threshold": {"threshold": 0.1}}


def make_model(name, gate=Gate):
    selector = registry.load("selectors", name)
    layer = {"groups": Groups.equal(E, 2), "k": 1 if name in registry.GROUPED_SELECTORS else 2}
    options = {key: value for key, value in layer.items() if key in inspect.signature(selector).parameters}
    selector = partial(selector, **options, **OPTIONS.get(name, {}))

    def feed_forward(index):
        router = Router(gate(D, E), selector, num_experts=E, score=scores.softmax, balancer=Switch(weight=0.05))
        return MoE(router, SwiGLUExperts(E, D, 6))

    torch.manual_seed(0)
    model = DecoderLM(vocab_size=V, dim=D, num_layers=2, num_heads=2, feed_forward=feed_forward)
    with torch.no_grad():
        model.embedding.weight.mul_(50)
        for one in himoe.moe_layers(model):
            one.router.gate.weight.mul_(50)
    return model.double()


def token_ids(rows, length, seed=0):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model, ids, mask=None):
    logits, routings = model(ids, mask)
    logits = logits if mask is None else logits[mask]
    return logits.square().mean() + sum(himoe.aux_losses(model, routings).values()), routings


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SELECTORS)
def test_padding_changes_neither_loss_nor_gradient(name, training):
    model, ids = make_model(name).train(training), token_ids(2, 9)
    plain, _ = loss_of(model, ids)
    expected = torch.autograd.grad(plain, list(model.parameters()))
    padded, mask = torch.zeros(2, 13, dtype=torch.int64), torch.zeros(2, 13, dtype=torch.bool)
    padded[0, :9], padded[1, 4:] = ids[0], ids[1]  # behind one row and before the other
    mask[0, :9] = mask[1, 4:] = True
    loss, _ = loss_of(model, padded, mask)
    torch.testing.assert_close(loss, plain)
    for one, other in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("name", SELECTORS)
def test_recompute_changes_nothing(name, recompute):
    found = []
    for mode in ("none", recompute):
        model = make_model(name)
        model.recompute = mode
        loss, routings = loss_of(model, token_ids(2, 9))
        loss.backward()
        found.append(([p.grad for p in model.parameters()], [(r.expert_ids, r.selected) for r in routings]))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("name", BY_THEMSELVES)
def test_a_row_does_not_depend_on_the_rest_of_the_batch(name):
    model, ids = make_model(name), token_ids(8, 9)
    together = model(ids)[0]
    for row in range(8):
        torch.testing.assert_close(model(ids[row : row + 1])[0][0], together[row])


@pytest.mark.parametrize("gate", [NoisyGate, CosineGate])
def test_gates_in_a_whole_model_ignore_padding_and_are_quiet_in_eval(gate):
    model, ids = make_model("top_k", gate), token_ids(2, 9)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, 9:] = False
    padded = torch.cat([ids, torch.zeros(2, 3, dtype=torch.int64)], dim=1)
    model.eval()
    torch.testing.assert_close(model(padded, mask)[0][:, :9], model(ids)[0])
    model.train()
    values = []
    for seed in (0, 0, 1):
        seed_noise(seed, 0, 0, 0)
        values.append(loss_of(model, ids)[0].item())
    assert values[0] == values[1] and (values[1] != values[2]) == (gate is NoisyGate)
