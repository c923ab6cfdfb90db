"""Plain activation checkpointing of an MoE block: the same routing, gradients and state as without, ties included."""

import pytest
import torch
from small_layers import Residual, make_moe, tokens
from torch.utils.checkpoint import checkpoint

from himoe import aux_losses, collect_routings, observe, step

pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")


def train_once(preset, x, *, recompute):
    model = Residual(make_moe(preset), make_moe(preset, seed=1))
    x = x.clone().requires_grad_()
    with collect_routings(model) as routings:
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
    (y.square().sum() + sum(aux_losses(model, routings).values())).backward()
    observe(model, routings)
    step(model)
    grads = {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad}
    return y, routings, grads, dict(model.named_buffers())


@pytest.mark.parametrize("preset", ["hi_moe", "hi_moe_official", "switch", "loss_free"])
@pytest.mark.parametrize("ties", [False, True])
def test_recompute_changes_nothing(preset, ties):
    x = tokens(4, 6)
    if ties:  # tokens of zeros have eight equal logits, repeated tokens equal rows
        x = torch.cat([torch.zeros_like(x), x[:1].expand_as(x)])
    y, routings, grads, state = train_once(preset, x, recompute=False)
    y_again, routings_again, grads_again, state_again = train_once(preset, x, recompute=True)
    assert torch.equal(y, y_again)
    assert all(torch.equal(a.expert_ids, b.expert_ids) for a, b in zip(routings, routings_again, strict=True))
    assert {n: g is None for n, g in grads.items()} == {n: g is None for n, g in grads_again.items()}
    assert all(torch.equal(grads[n], grads_again[n]) for n in grads if grads[n] is not None)
    assert all(torch.equal(state[n], state_again[n]) for n in state)
    assert preset == "switch" or any(buffer.any() for buffer in state.values())  # something did move
