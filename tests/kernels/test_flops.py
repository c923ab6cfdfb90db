"""What FlopCounterMode counts for the expert MLP, against counts by hand, on real tensors and on the meta device."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from himoe.kernels import BACKENDS, expert_mlp

T, K, E, D, F = 7, 2, 3, 16, 8
PAIRS = 14


def arguments(device, up_rows, needed):
    with torch.device(device):
        sizes = {"x": (T, D), "weights": (T, K), "up": (E, up_rows, D), "down": (E, D, F)}
        floats = {name: torch.ones(size, requires_grad=name in needed) for name, size in sizes.items()}
        ids, kept = torch.zeros(T, K, dtype=torch.int64), torch.ones(T, K, dtype=torch.bool)
    return floats["x"], ids, floats["weights"], kept, floats["up"], floats["down"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("activation", "up_rows"), [("swiglu", 16), ("relu", 8)])
@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_forward_and_backward_of_a_training_step(device, activation, up_rows, backend):
    given = arguments(device, up_rows, ("x", "weights", "up", "down"))
    with FlopCounterMode(display=False) as forward:
        y = expert_mlp(*given, activation=activation, backend=backend)
    up, down = 2 * PAIRS * up_rows * 16, 2 * PAIRS * 16 * 8
    assert forward.get_total_flops() == up + down
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * (up + down)


@pytest.mark.parametrize(
    "needed", [n for size in (1, 2, 3) for n in itertools.combinations(("x", "weights", "up", "down"), size)]
)
def test_frozen_parts_cost_no_product(needed):
    y = expert_mlp(*arguments("meta", 16, needed))
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    up, down = 2 * PAIRS * 16 * 16, 2 * PAIRS * 16 * 8
    through_the_activation = down if {"x", "weights", "up"} & set(needed) else 0
    expected = through_the_activation + sum({"x": up, "weights": 0, "up": up, "down": down}[name] for name in needed)
    assert counter.get_total_flops() == expected


def test_every_backend_counts_alike_on_the_meta_device():
    def count(backend):
        with FlopCounterMode(display=False) as counter:
            expert_mlp(*arguments("meta", 16, ()), backend=backend)
        return counter.get_total_flops()

    assert {count(backend) for backend in BACKENDS} == {2 * PAIRS * (16 * 16 + 16 * 8)}
