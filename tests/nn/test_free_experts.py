"""Zero, copy and constant experts against their formulas, one pair at a time."""

import pytest
import torch
from small_layers import D, make_router, tokens
from torch.utils.flop_counter import FlopCounterMode

from himoe import MoE
from himoe.errors import ConfigError
from himoe.nn import ConstantExperts, CopyExperts, ZeroExperts

T, E, K = 7, 3, 2


def pairs(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    expert_ids = torch.rand(T, E, generator=generator).topk(K).indices
    weights = torch.rand(T, K, generator=generator, dtype=torch.float64).to(dtype)
    return expert_ids, weights, torch.rand(T, K, generator=generator) < 0.6


def one_pair(experts, x, e):
    if isinstance(experts, ZeroExperts):
        return 0 * x
    if isinstance(experts, CopyExperts):
        return x
    scores = [(experts.gate.weight[2 * e + i] * x).sum() for i in range(2)]
    of_x, of_constant = (score.exp() / sum(other.exp() for other in scores) for score in scores)
    return of_x * x + of_constant * experts.constant.weight[e]


@pytest.mark.parametrize("make", [lambda: ZeroExperts(E), lambda: CopyExperts(E), lambda: ConstantExperts(E, D)])
def test_output_and_gradients_are_the_formula(make):
    torch.manual_seed(0)
    experts, x = make().double(), tokens(T, dtype=torch.float64).requires_grad_()
    expert_ids, weights, kept = pairs()
    weights.requires_grad_()
    y = experts(x, expert_ids, weights, kept)
    rows = []
    for t in range(T):
        row = 0 * x[t]
        for k in range(K):
            row = row + kept[t, k] * weights[t, k] * one_pair(experts, x[t], int(expert_ids[t, k]))
        rows.append(row)
    expected = torch.stack(rows)
    torch.testing.assert_close(y, expected)
    if not y.requires_grad:
        assert isinstance(experts, ZeroExperts) and not y.any()
        return
    trained = [x, weights, *experts.parameters()]
    grads = torch.autograd.grad(y.square().sum(), trained)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), trained))


def test_a_constant_expert_by_hand():
    experts = ConstantExperts(2, 2)
    with torch.no_grad():
        experts.gate.weight.copy_(torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))
        experts.constant.weight.copy_(torch.tensor([[10.0, 20.0], [4.0, 8.0]]))
    x, one = torch.tensor([[torch.tensor(3.0).log(), 2.0]]), torch.ones(1, 1)
    # expert 0 mixes half and half; expert 1 has e^(ln 3)/(e^(ln 3) + 1) = 3/4 of x
    for e, expected in ((0, x / 2 + torch.tensor([5.0, 10.0])), (1, 0.75 * x + torch.tensor([1.0, 2.0]))):
        torch.testing.assert_close(experts(x, torch.tensor([[e]]), one, one.bool()), expected)


def test_no_product_of_the_size_of_an_expert():
    x, (expert_ids, weights, kept) = tokens(T), pairs(dtype=torch.float32)
    for experts, products in ((ZeroExperts(E), 0), (CopyExperts(E), 0), (ConstantExperts(E, D), 3 * E)):
        with FlopCounterMode(display=False) as counter:
            experts(x, expert_ids, weights, kept)
        assert counter.get_total_flops() == 2 * T * D * products  # the gate's 2·E rows and the E constants


def test_constant_experts_start_as_stated():
    torch.manual_seed(0)
    experts = ConstantExperts(40, 64)
    assert experts.constant.weight.std().item() == pytest.approx(1, rel=0.05)
    assert experts.gate.weight.std().item() == pytest.approx(1 / 8, rel=0.05)


@pytest.mark.parametrize("make", [ZeroExperts, CopyExperts, lambda n: ConstantExperts(n, D)])
def test_under_autocast_they_give_its_dtype_as_other_experts_do(make):
    x, (expert_ids, weights, kept) = tokens(T), pairs(dtype=torch.float32)
    experts = make(E)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, expert_ids, weights, kept)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), experts(x, expert_ids, weights, kept), atol=0.05, rtol=0.05)
    assert experts(x.double(), expert_ids, weights, kept).dtype == torch.float64


def test_the_mixing_of_a_constant_expert_is_decided_in_fp32():
    torch.manual_seed(0)
    experts, x = ConstantExperts(1, D), tokens(200)
    with torch.no_grad():
        experts.constant.weight.zero_()
    one = torch.ones(200, 1)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, torch.zeros(200, 1, dtype=torch.int64), one, one.bool())
    of_x = (x.double() @ experts.gate.weight.double().T).softmax(-1)[:, :1]
    assert torch.equal(y, x.bfloat16() * of_x.bfloat16())


def test_a_layer_of_copies_gives_the_tokens_back():
    x = tokens(2, 5)
    y, _ = MoE(make_router("loss_free"), CopyExperts(8))(x)
    torch.testing.assert_close(y, x)  # renormalised weights sum to 1


def test_sizes_that_cannot_be_are_named():
    with pytest.raises(ConfigError, match="ZeroExperts: num_experts = 0 must be ≥ 1"):
        ZeroExperts(0)
    with pytest.raises(ConfigError, match="ConstantExperts: dim = 0 must be ≥ 1"):
        ConstantExperts(2, 0)
