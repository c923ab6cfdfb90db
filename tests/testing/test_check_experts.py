"""The conformance suite of experts: every entry passes it, and every kind of broken one is named for what it breaks."""

import inspect

import pytest
import torch
from broken_experts import BROKEN, BreaksTheGraph, D, HalvesTheGradientOfTheTokens, LowRank, Matrices

from himoe import registry
from himoe.nn import ConstantExperts, CopyExperts, GELUExperts, PooledExperts, ReLU2Experts, SwiGLUExperts, ZeroExperts
from himoe.testing import check_experts

SIZES = {"num_experts": 4, "dim": 8, "hidden_dim": 12}
FAST = ["loop", "grouped"]


def made(name, **options):
    """Return a constructor without arguments of a table's entry, and whether its kernel has backends."""
    constructor = registry.load("experts", name)
    accepted = inspect.signature(constructor).parameters
    given = {key: value for key, value in {**SIZES, **options}.items() if key in accepted}
    return lambda: constructor(**given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", registry.EXPERTS)
def test_every_entry_of_the_table_conforms(name, dtype):
    for backend in FAST:
        check_experts(made(name, backend=backend), dim=SIZES["dim"], dtype=dtype)


@pytest.mark.parametrize("top_k", [1, 4])
@pytest.mark.parametrize("name", registry.EXPERTS)
def test_with_one_choice_and_with_all(name, top_k):
    check_experts(made(name), dim=SIZES["dim"], top_k=top_k, dtype=torch.float64)


@pytest.mark.parametrize("name", registry.EXPERTS)
def test_a_single_expert(name):
    check_experts(made(name, num_experts=1), dim=SIZES["dim"], dtype=torch.float64)


POOLS = {
    "one": lambda: PooledExperts(SwiGLUExperts(4, 8, 12)),
    "two sizes": lambda: PooledExperts(SwiGLUExperts(3, 8, 12), SwiGLUExperts(5, 8, 4)),
    "two kinds": lambda: PooledExperts(GELUExperts(2, 8, 4), ReLU2Experts(2, 8, 12)),
    "ordinary and free": lambda: PooledExperts(
        SwiGLUExperts(3, 8, 12), ZeroExperts(1), CopyExperts(1), ConstantExperts(2, 8)
    ),
    "free alone": lambda: PooledExperts(ZeroExperts(2), CopyExperts(2)),
    "pools of pools": lambda: PooledExperts(
        PooledExperts(SwiGLUExperts(2, 8, 4), ZeroExperts(1)), GELUExperts(2, 8, 4)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", POOLS)
def test_pools_conform(name, dtype):
    check_experts(POOLS[name], dim=8, top_k=3, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_experts_that_the_broken_ones_break_are_sound(dtype):
    check_experts(Matrices, dim=D, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frozen_parameters_and_ones_that_start_at_zero_are_sound(dtype):
    check_experts(LowRank, dim=D, dtype=dtype)


def test_a_wrong_gradient_of_the_tokens_is_seen_in_fp64():
    with pytest.raises(AssertionError, match="Tokens: the gradient of x is not the slope of the output"):
        check_experts(HalvesTheGradientOfTheTokens, dim=D, dtype=torch.float64)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_broken_experts_are_caught_and_named(broken):
    with pytest.raises(AssertionError) as caught:
        check_experts(broken, dim=D)
    assert str(caught.value).startswith(f"{broken.__name__}: {BROKEN[broken]}")


def test_experts_that_need_not_compile():
    check_experts(BreaksTheGraph, dim=D, compiles=False)
