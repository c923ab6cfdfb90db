"""Layers whose tokens have different numbers of experts: values, gradients, and what unused places cost."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from himoe import MoE, Router, SwiGLUExperts
from himoe.functional import reference
from himoe.functional.dispatch import sort_by_expert
from himoe.functional.scores import relu, softmax
from himoe.functional.selection import expert_choice, threshold, top_p
from himoe.kernels import loop
from himoe.nn import Gate, aux_losses, observe, step

D, E, F = 6, 5, 4
KINDS = {
    "remoe": (threshold, relu, False),
    "remoe, at most 2": (partial(threshold, max_k=2), relu, False),
    "top_p": (partial(top_p, p=0.6), softmax, True),
    "top_p, at most 2": (partial(top_p, p=0.6, max_k=2), softmax, False),
    "expert_choice": (partial(expert_choice, k=2), softmax, False),
}


def layer_of(kind):
    selector, score, renormalize = KINDS[kind]
    torch.manual_seed(0)
    router = Router(Gate(D, E), selector, num_experts=E, score=score, renormalize=renormalize)
    return MoE(router, SwiGLUExperts(E, D, F)).double()


def tokens(count=12):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_the_reference_with_its_gradients(kind):
    layer, x = layer_of(kind), tokens()
    parameters = [layer.router.gate.weight, *layer.experts.parameters()]
    y, routing = layer(x)
    assert 0 < routing.selected.sum() < routing.selected.numel()
    expected = reference.moe(
        x, routing.expert_ids, routing.weights, routing.kept, *layer.experts.parameters(), "swiglu"
    )
    torch.testing.assert_close(y, expected)
    grads = [torch.autograd.grad(value.square().sum(), parameters, retain_graph=True) for value in (y, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_remoe_by_hand():
    """Σ_e relu(logit_e)·expert_e(x), over all experts."""
    layer, x = layer_of("remoe"), tokens()
    up, down = layer.experts.parameters()
    logits = x @ layer.router.gate.weight.T
    expected = torch.stack(
        [
            sum(logits[t, e].relu() * reference.expert(x[t], up[e], down[e], "swiglu") for e in range(E))
            for t in range(12)
        ]
    )
    torch.testing.assert_close(layer(x)[0], expected)


@pytest.mark.parametrize("kind", ["remoe", "remoe, at most 2"])
def test_a_token_without_an_expert_gets_nothing_and_stays_finite(kind):
    layer, x = layer_of(kind), tokens()
    with torch.no_grad():
        layer.router.gate.weight.copy_(-x[:1].sign().expand(E, -1))
    x = x.requires_grad_()
    y, routing = layer(x)
    assert not routing.selected[0].any() and (y[0] == 0).all() and (routing.weights[0] == 0).all()
    y.sum().backward()
    assert x.grad.isfinite().all() and (x.grad[0] == 0).all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_a_layer_without_any_pair_trains():
    layer, x = layer_of("remoe"), tokens()
    with torch.no_grad():
        layer.router.gate.weight.zero_()
    y, routing = layer(x)
    assert (y == 0).all() and not routing.kept.any()
    (y.sum() + sum(aux_losses(layer, [routing]).values())).backward()
    observe(layer, [routing])
    step(layer)
    assert all((parameter.grad == 0).all() for parameter in layer.parameters())


@pytest.mark.parametrize("kept_pairs", [0, 1, 7, 36])
def test_only_kept_pairs_are_computed_in_both_directions(kept_pairs):
    count, k = 12, 3
    generator = torch.Generator().manual_seed(0)
    expert_ids = torch.randint(E, (count, k), generator=generator)
    kept = (torch.randperm(count * k, generator=generator) < kept_pairs).view(count, k)
    x, weights = tokens(count).float(), torch.rand(count, k, generator=generator)
    up, down = (torch.randn(*shape, generator=generator) for shape in ((E, 2 * F, D), (E, D, F)))
    rows = sort_by_expert(expert_ids, kept, E)
    with FlopCounterMode(display=False) as forward:
        y, hidden = loop.forward(x, weights, rows, up, down, "swiglu")
    assert forward.get_total_flops() == kept_pairs * 2 * (2 * F * D + D * F)
    with FlopCounterMode(display=False) as backward:
        loop.backward(torch.ones_like(y), x, weights, hidden, rows, up, down, "swiglu", (True,) * 4)
    assert backward.get_total_flops() == 2 * forward.get_total_flops()
