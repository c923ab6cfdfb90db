"""Planned FLOPs against what torch counts in one training step of the real model."""

from contextlib import ExitStack

import pytest
import torch
from planned import MODELS, VARIANTS, planned
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import himoe
from himoe.build import build_model
from himoe.config import load_config, recipe_names
from himoe.plan import flops, shape_of
from himoe.plan.shape import Experts

pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")

ROWS, LENGTH = 2, 24


def _pair_flops(pairs, up, down):
    return 2 * pairs * (up[1] * up[2] + down[1] * down[2])


def _expert_forward(x, weights, *arguments, out_shape=None):
    *_, up, down, _activation, _backend = arguments
    return _pair_flops(weights[0] * weights[1], up, down)


def _expert_backward(grad, x, weights, *arguments, out_shape=None):
    *_, up, down, _activation, _backend, _needs = arguments
    return 2 * _pair_flops(weights[0] * weights[1], up, down)


RULES = {
    operator: rule
    for operator, rule in (
        (torch.ops.himoe.expert_mlp, _expert_forward),
        (torch.ops.himoe.expert_mlp_backward, _expert_backward),
    )
    if operator not in flop_registry
}
"""Every place of a token counts, a pair in it or not."""


def counted(config, device="cpu", length=LENGTH):
    """Return the FLOPs of a token in the forward pass, and in the backward pass, where a step computes them."""
    vocab_size = shape_of(config).vocab_size
    with torch.device(device):
        model = build_model(config, vocab_size).train()
        model.recompute = config.train.recompute
        tokens = torch.randint(vocab_size, (ROWS, length))
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            forward = stack.enter_context(FlopCounterMode(display=False, custom_mapping=RULES))
            loss, routings = model(tokens, targets=tokens)
            total = loss + sum(himoe.aux_losses(model, routings).values())
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=RULES) as backward:
            total.backward()
    return forward.get_total_flops() / tokens.numel(), backward.get_total_flops() / tokens.numel()


def planned_for_every_place(shape, length, recompute="none"):
    """Return what is planned, with an expert's products for every place, as torch counts them: (forward, total)."""
    found = flops(shape, length, recompute)
    missing = 0.0
    for layer in shape.layers:
        part = layer.feed_forward
        if isinstance(part, Experts):
            for pool in part.pools:
                if pool.network:
                    idle = part.top_k - pool.used * part.presence
                    missing += layer.count * 2 * float(idle * pool.network.products(shape.dim))
    times = 4 if recompute == "full" else 3
    return found.forward + missing, found.total + times * missing


def agrees(config, device="cpu", length=LENGTH):
    forward, backward = counted(config, device, length)
    head = 2 * shape_of(config).vocab_size * config.model.dim
    planned_forward, total = planned_for_every_place(shape_of(config), length, config.train.recompute)
    assert forward - 2 * head == pytest.approx(planned_forward, rel=1e-12)  # the head's gradients are taken in advance
    assert forward + backward == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("variant", [*VARIANTS, *MODELS])
def test_every_variant_takes_the_flops_of_a_real_step(variant):
    agrees(planned(variant))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("variant", ["hi_moe", "dense", "shared", "shared_gate", "pools", "cosine"])
def test_recompute_takes_the_flops_of_a_real_step(variant, recompute):
    agrees(planned(variant, recompute=recompute))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_takes_the_flops_of_a_step_on_the_meta_device(name):
    agrees(load_config(name), device="meta", length=load_config(name).train.seq_len // 4)


def test_by_role_worked_by_hand():
    shape = shape_of(load_config("lm_tiny"))
    by_role = flops(shape, 64).forward_by_role
    L, D, H = 2, 32, 2
    assert by_role == {
        "head": 2 * 257 * D,
        "attention": 2 * L * (D * (D + 2 * 16) + D * D),
        "attention_scores": 2 * L * 2 * H * 16 * 64,
        "router": 2 * L * D * 8,
        "experts": 2 * L * 4 * 3 * D * 32,
    }
    assert flops(shape, 64).forward == sum(by_role.values())
    assert flops(shape, 64).total == 3 * sum(by_role.values())


def test_attention_with_a_window_sees_no_more_than_that():
    from himoe.plan import named_shape

    def scores(length):
        return flops(named_shape("gpt_oss_120b"), length).forward_by_role["attention_scores"]

    assert scores(4096) == 2 * 18 * 2 * 4096 * (4096 + 128)
    assert scores(64) == 2 * 36 * 2 * 4096 * 64
