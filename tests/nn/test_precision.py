"""A whole layer in bf16, by autocast and by `.to(torch.bfloat16)`: routing and balancer state stay fp32."""

import pytest
import torch
from small_layers import Residual, make_moe, tokens

from himoe import aux_losses, collect_routings, observe, step
from himoe.nn import SwiGLU

DTYPES = {"logits": torch.float32, "scores": torch.float32, "weights": torch.float32, "expert_ids": torch.int64}


def train_once(model, x):
    with collect_routings(model) as routings:
        y = model(x)
    losses = aux_losses(model, routings)
    (y.float().square().mean() + sum(losses.values())).backward()
    observe(model, routings)
    step(model)
    for routing in routings:
        assert {n: getattr(routing, n).dtype for n in DTYPES} == DTYPES
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())
    return y


def small_model(preset):
    return Residual(make_moe(preset, shared=SwiGLU(16, 8)), make_moe(preset, seed=1))


@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_autocast(backend):
    moe, x = make_moe(backend=backend, shared=SwiGLU(16, 8)), tokens(2, 9)
    expected, same = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = moe(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(routing.logits, same.logits)
    torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=0.05)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in moe.parameters())


@pytest.mark.parametrize("preset", ["hi_moe", "loss_free"])
def test_training_under_autocast_moves_fp32_state(preset):
    model = small_model(preset)
    before = {n: b.clone() for n, b in model.named_buffers()}
    with torch.autocast("cpu", torch.bfloat16):
        train_once(model, tokens(4, 9))
    assert all(b.dtype == torch.float32 and not torch.equal(b, before[n]) for n, b in model.named_buffers())


@pytest.mark.parametrize("preset", ["hi_moe", "loss_free"])
@pytest.mark.parametrize("convert", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half()])
def test_a_half_precision_model_keeps_fp32_routing_and_state(preset, convert):
    model = convert(small_model(preset))
    dtype = next(model.parameters()).dtype
    assert dtype != torch.float32
    before = {n: b.clone() for n, b in model.named_buffers()}
    y = train_once(model, tokens(4, 9, dtype=dtype))
    assert y.dtype == dtype and all(p.grad.dtype == dtype for p in model.parameters())
    assert all(b.dtype == torch.float32 and not torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_small_bias_steps_are_not_lost_in_a_bf16_model():
    moe = make_moe("loss_free")
    moe.router.balancer.bias.fill_(0.1)
    moe.to(torch.bfloat16)
    assert torch.equal(moe.router.balancer.bias, torch.full((8,), 0.1))  # nor rounded on the way
    x = tokens(64, dtype=torch.bfloat16) + 0.5
    with torch.no_grad():
        moe.router.balancer.bias.fill_(1.0)  # one step of 1e-3 is below bf16's resolution here
        observe(moe, [moe(x)[1]])
    step(moe)
    moves = (moe.router.balancer.bias - 1).abs()
    assert moves.max().item() == pytest.approx(1e-3, rel=1e-3)
