"""The MoE layer: its output is the double loop over its own routing, whatever the input's shape, mask and strides."""

import pytest
import torch
from small_layers import PRESETS, D, E, make_moe, make_router, tokens
from torch import nn

from himoe import Capacity, Dropless, Gate, GELUExperts, MoE, Router, SwiGLUExperts, presets
from himoe.errors import ConfigError
from himoe.functional import reference
from himoe.functional.selection import top_k
from himoe.nn import ReLU2Experts, ReLUExperts, SwiGLU

pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")


def by_reference(moe, x, routing):
    experts = moe.experts
    up_proj = experts.gate_up_proj if experts.activation == "swiglu" else experts.up_proj
    flat = x.reshape(-1, x.shape[-1])
    y = reference.moe(
        flat, routing.expert_ids, routing.weights, routing.kept, up_proj, experts.down_proj, experts.activation
    )
    if moe.shared_expert is not None:
        gate, value = (flat @ moe.shared_expert.gate_up_proj.weight.T).chunk(2, dim=-1)
        y = y + (gate * torch.sigmoid(gate) * value) @ moe.shared_expert.down_proj.weight.T
    return y.view_as(x)


@pytest.mark.parametrize("experts", [SwiGLUExperts, GELUExperts, ReLUExperts, ReLU2Experts])
@pytest.mark.parametrize("preset", PRESETS)
def test_output_and_gradients_are_the_double_loop(preset, experts):
    moe = make_moe(preset, experts=experts, shared=SwiGLU(D, 10)).double()
    x = tokens(2, 5, dtype=torch.float64).requires_grad_()
    y, routing = moe(x)
    expected = by_reference(moe, x, routing)
    torch.testing.assert_close(y, expected)
    trained = [x, *moe.parameters()]
    upstream = torch.randn_like(y)
    grads = torch.autograd.grad(y, trained, upstream, retain_graph=True, allow_unused=True)
    expected_grads = torch.autograd.grad(expected, trained, upstream, allow_unused=True)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("dispatcher", [Dropless(), Capacity(1.0), Capacity(0.5, order="column_major")])
def test_backends_and_dispatchers_in_fp32_with_padding(backend, dispatcher):
    moe = make_moe("switch", top_k=2, backend=backend, dispatcher=dispatcher)
    x, mask = tokens(3, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    y, routing = moe(x, mask)
    torch.testing.assert_close(y, by_reference(moe, x, routing))
    assert (y[~mask] == 0).all() and (y[mask] != 0).any()


@pytest.mark.parametrize("shape", [(), (1,), (0,), (5,), (2, 3), (0, 3), (2, 1, 3)])
def test_any_leading_shape(shape):
    moe = make_moe()
    x = tokens(*shape).requires_grad_()
    y, routing = moe(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (*shape, D)
    assert routing.context.batch_shape == shape
    assert routing.expert_ids.shape == (x.numel() // D, 4)
    torch.testing.assert_close(y, moe(x.reshape(-1, D))[0].view_as(x))


def test_strides_of_the_input_do_not_matter():
    moe = make_moe()
    x = tokens(4, 3).transpose(0, 1)
    mask = torch.tensor([[True, False, True], [True, True, False], [False, True, True], [True, True, True]]).T
    assert not x.is_contiguous() and not mask.is_contiguous()
    y, routing = moe(x, mask)
    expected, same = moe(x.contiguous(), mask.contiguous())
    assert torch.equal(y, expected) and torch.equal(routing.expert_ids, same.expert_ids)


def test_the_shared_expert_sees_every_token_and_no_routing_weight():
    shared = SwiGLU(D, 10)
    with_shared, without = make_moe(shared=shared), make_moe()
    x = tokens(6)
    torch.testing.assert_close(with_shared(x)[0], without(x)[0] + shared(x))


def test_padding_changes_nothing_for_real_tokens():
    moe = make_moe(shared=SwiGLU(D, 10), dispatcher=Capacity(1.0))
    x, padding = tokens(2, 5), tokens(2, 3, seed=1) * 5
    mask = torch.cat([torch.ones(2, 5), torch.zeros(2, 3)], dim=1).bool()
    y, routing = moe(x)
    padded_y, padded = moe(torch.cat([x, padding], dim=1), mask)
    torch.testing.assert_close(padded_y[mask].view_as(y), y)
    for name in ("expert_ids", "selected", "kept"):
        assert torch.equal(getattr(padded, name)[mask.flatten()], getattr(routing, name)), name
    assert not padded.selected[~mask.flatten()].any() and not padded.weights[~mask.flatten()].any()


def test_a_batch_of_padding_alone_and_its_gradient_are_zero():
    moe = make_moe(dispatcher=Capacity(1.0))
    x = tokens(4).requires_grad_()
    y, routing = moe(x, torch.zeros(4, dtype=torch.bool))
    y.sum().backward()
    assert not routing.selected.any() and not y.any() and not x.grad.any()
    assert all(not p.grad.any() for p in moe.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": torch.ones(4, dtype=torch.bool)}, r"mask has shape \(4,\), x needs \(2, 4\)"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, r"mask has shape \(2, 3\), x needs \(2, 4\)"),
        ({"mask": torch.ones(2, 4, 1, dtype=torch.bool)}, r"mask has shape \(2, 4, 1\)"),
        ({"mask": torch.ones(2, 4, dtype=torch.int64)}, r"mask is torch.int64, must be torch.bool.*mask.bool\(\)"),
        ({"mask": torch.ones(2, 4)}, "mask is torch.float32, must be torch.bool"),
        ({"token_ids": torch.ones(8, dtype=torch.int64)}, r"token_ids has shape \(8,\), x needs \(2, 4\)"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_moe()(tokens(2, 4), **arguments)


def test_experts_must_be_as_many_as_the_router_has():
    with pytest.raises(ConfigError, match="the router has num_experts = 8, the experts are 6"):
        MoE(make_router(), SwiGLUExperts(6, D, 12))


@pytest.mark.parametrize("sizes", [(0, 4, 4), (4, 0, 4), (4, 4, 0)])
def test_experts_of_no_size_are_refused(sizes):
    with pytest.raises(ConfigError, match="must be ≥ 1"):
        GELUExperts(*sizes)


def test_somebody_elses_experts_need_only_be_callable():
    class Identities(nn.Module):
        def forward(self, x, expert_ids, weights, kept):
            return x * (weights * kept).sum(-1, keepdim=True)

    moe = MoE(make_router(), Identities())
    x = tokens(5)
    torch.testing.assert_close(moe(x)[0], x)


def test_one_expert_that_everybody_takes():
    moe = MoE(presets.switch(D, 1, 1), SwiGLUExperts(1, D, 12))
    x = tokens(3)
    y, routing = moe(x)
    assert routing.weights.tolist() == [[1.0]] * 3
    torch.testing.assert_close(y, by_reference(moe, x, routing))


def test_every_expert_taken_by_every_token():
    router = Router(Gate(D, E), lambda s, c: top_k(s, c, k=E), num_experts=E)
    moe = MoE(router, SwiGLUExperts(E, D, 12))
    x = tokens(3)
    y, routing = moe(x)
    torch.testing.assert_close(routing.weights.sort().values, routing.logits.softmax(-1).sort().values)
    torch.testing.assert_close(y, by_reference(moe, x, routing))


def test_expert_weights_start_at_the_stated_standard_deviation():
    torch.manual_seed(0)
    experts = SwiGLUExperts(8, 64, 100)
    assert experts.gate_up_proj.shape == (8, 200, 64) and experts.down_proj.shape == (8, 64, 100)
    assert experts.gate_up_proj.std().item() == pytest.approx(1 / 8, rel=0.02)
    assert experts.down_proj.std().item() == pytest.approx(1 / 10, rel=0.02)
