"""Activation recompute of a whole model: routing, counts, gradients and state stay, near ties included."""

from functools import partial

import pytest
import torch
from router_zoo import ALL, E, loss_of, make_model, same, state_of, token_ids
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import himoe

pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")


def recompute(model, **options) -> None:
    """Wrap every block of a model in activation checkpointing."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)


def routed(model, ids) -> list:
    """Let every router write down what it decides, forward and recompute alike."""
    seen = []
    for layer in himoe.moe_layers(model):
        layer.router.register_forward_hook(lambda module, inputs, routing: seen.append(routing.expert_ids.clone()))
    loss, routings = loss_of(model, ids)
    loss.backward()
    himoe.observe(model, routings)
    himoe.step(model)
    return seen


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_plain_recompute_repeats_the_routing_and_changes_nothing(name, ties):
    outcomes = []
    for again in (False, True):
        model = make_model(name, dtype=torch.float32)
        if ties:  # experts in pairs whose logits differ in the last bits at most
            for layer in himoe.moe_layers(model):
                with torch.no_grad():
                    weight = layer.router.gate.weight
                    weight[1::2] = weight[::2] * (1 + 1e-7)
        if again:
            recompute(model)
        seen = routed(model, token_ids())
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        outcomes.append((seen, grads, state_of(model)))
    (seen, grads, state), (seen_again, grads_again, state_again) = outcomes
    assert len(seen) == 2 and len(seen_again) == 4  # each layer ran a second time
    first, second = seen_again[:2], seen_again[:1:-1]  # backward recomputes the last layer first
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(seen, first, second, strict=True))
    assert same(grads, grads_again) and same(state, state_again)


class TremblingGate(nn.Module):
    """A gate whose last bits differ from call to call, as kernels with another order of addition give."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate, self.calls = gate, 0

    @property
    def weight(self):
        return self.gate.weight

    def forward(self, x):
        self.calls += 1
        return self.gate(x) * 0 + torch.arange(E, dtype=x.dtype) * (1e-9 if self.calls % 2 else -1e-9)


def save_routing(context, operator, *arguments, **options):
    must_save = operator == torch.ops.aten.topk.default
    return CheckpointPolicy.MUST_SAVE if must_save else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("name", ["hi_moe", "moge", "switch", "loss_free"])
def test_saved_routing_survives_recompute_where_near_ties_would_flip(name):
    """Selective checkpointing that must-saves topk keeps the choices; recomputed topk would flip every one of them."""
    for options, flips in (
        ({}, True),
        ({"context_fn": partial(create_selective_checkpoint_contexts, save_routing)}, False),
    ):
        model = make_model(name, layers=(1,))
        layer = himoe.moe_layers(model)[0]
        layer.router.gate = TremblingGate(layer.router.gate)
        recompute(model, **options)
        first, second = routed(model, token_ids())
        assert torch.equal(first, second) != flips
