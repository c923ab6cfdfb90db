"""Presets against the blocks of transformers v5 with the same weights: routing, output, gradients."""

import pytest
import torch
from transformers_blocks import D, by_expert, cases, make_block, our_layer, pairs

ROWS, LENGTH = 3, 11
CASES = cases()
ids = [str(case) for case in CASES]


def run(module, x, direction):
    """Output, and the gradient of x; parameters get theirs."""
    x = x.clone().requires_grad_()
    output = module(x)
    y, rest = output if isinstance(output, tuple) else (output, None)
    (y * direction).sum().backward()
    return y.detach(), x.grad, rest


def inputs(seed, dtype):
    generator = torch.Generator().manual_seed(100 + seed)
    x, direction = torch.randn(2, ROWS, LENGTH, D, generator=generator, dtype=torch.float64).to(dtype)
    return x, direction


def check_equal(case, block, seed, dtype=torch.float32):
    layer = our_layer(case, block, dtype)
    x, direction = inputs(seed, dtype)
    with torch.no_grad():
        logits, weights, expert_ids = block.gate(x.flatten(0, -2))
    theirs, their_dx, _ = run(block, x, direction)
    ours, our_dx, routing = run(layer, x, direction)
    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(routing.logits, logits, **close)
    their_ids, their_weights = by_expert((expert_ids, weights))
    our_ids, our_weights = by_expert(routing)
    assert torch.equal(our_ids, their_ids)
    torch.testing.assert_close(our_weights, their_weights, **close)
    torch.testing.assert_close(ours, theirs, **close)
    torch.testing.assert_close(our_dx, their_dx, **close)
    for name, (their_grad, our_grad) in pairs(block, layer).items():
        assert their_grad.abs().max() > 1e-2 or name == "gate", name
        torch.testing.assert_close(our_grad, their_grad, **close, msg=lambda text, name=name: f"{name}: {text}")
    return routing, block.gate.weight.grad


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_routing_output_and_gradients_are_theirs(case, seed):
    block = make_block(case, seed, torch.float32)
    routing, gate_grad = check_equal(case, block, seed)
    counts = torch.bincount(routing.expert_ids.flatten(), minlength=case.num_experts)
    if case.top_k < case.num_experts:
        assert counts.max() > counts.min()  # uneven, or a mistaken expert would not show
    # One renormalised weight is always the same: only then does the gate learn nothing from the task.
    assert (gate_grad.abs().max() > 1e-2) == (not (case.renormalize and case.top_k == 1))


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_they_agree_in_fp64_to_the_fp32_of_their_gate(case):
    check_equal(case, make_block(case, 5, torch.float64), 5, torch.float64)


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_their_other_implementations_of_the_experts_change_nothing(case, experts):
    check_equal(case, make_block(case, 7, torch.float32, experts), 7)


@pytest.mark.parametrize("case", [c for c in CASES if c.name.startswith(("deepseek", "glm"))], ids=str)
def test_the_correction_bias_of_these_cases_changes_choices(case):
    block = make_block(case, 0, torch.float32)
    layer = our_layer(case, block, torch.float32)
    x, _ = inputs(0, torch.float32)
    with_bias, _ = by_expert(layer(x)[1])
    for buffer in layer.router.balancer.buffers():
        buffer.zero_()
    without, _ = by_expert(layer(x)[1])
    assert not torch.equal(with_bias, without)
