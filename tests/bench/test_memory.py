import os

import pytest
import torch

from himoe.bench.contestant import Contestant
from himoe.bench.layer import ours
from himoe.bench.memory import highest, peak_bytes, saved_bytes
from himoe.bench.problem import make_problem
from himoe.bench.shapes import Shape
from himoe.kernels import caching_allocator

MIB = 2**20


def test_the_highest_level_counts_what_was_freed():
    assert highest([]) == 0
    assert highest([5, -5, 5, -5]) == 5
    assert highest([-3, 2]) == 0  # what was held before is not the step's


def test_the_peak_of_a_known_step():
    def step():
        first = torch.empty(4 * MIB, dtype=torch.uint8)
        second = torch.empty(2 * MIB, dtype=torch.uint8)
        del first
        third = torch.empty(3 * MIB, dtype=torch.uint8)
        return second, third

    assert peak_bytes(step) == 6 * MIB


def test_freeing_what_was_held_before_does_not_lower_the_peak():
    held = [torch.empty(8 * MIB, dtype=torch.uint8)]

    def step():
        torch.empty(MIB, dtype=torch.uint8)
        held.clear()

    assert peak_bytes(step) == MIB


def test_memory_that_our_kernels_kept_counts_as_the_steps():
    def step():
        return caching_allocator.empty(32 * MIB, like=torch.empty(0, dtype=torch.uint8))

    step()  # leaves a block behind
    assert peak_bytes(step) == 32 * MIB


def test_a_step_that_fails_gives_the_terminal_back(capfd):
    with pytest.raises(RuntimeError, match="no such luck"):
        peak_bytes(lambda: (_ for _ in ()).throw(RuntimeError("no such luck")))

    os.write(2, b"still here\n")
    assert "still here" in capfd.readouterr().err


def test_saved_bytes_of_known_products():
    x, w = torch.randn(10, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    assert saved_bytes(lambda: x @ w, [x, w]) == 0  # both were there before
    assert saved_bytes(lambda: x @ w, []) == 4 * (40 + 16)
    assert saved_bytes(lambda: torch.sigmoid(x), [x]) == 4 * 40  # its output
    assert saved_bytes(lambda: (torch.sigmoid(x) @ w) @ w, [x, w]) == 4 * (40 + 40)  # each tensor once


def test_our_kernel_saves_the_up_projection_and_the_order_of_the_pairs():
    shape = Shape("", tokens=12, dim=8, hidden_dim=16, num_experts=4, top_k=2)
    problem = make_problem(shape, "fp32", "uniform")
    contestant = ours(problem, "loop")
    assert isinstance(contestant, Contestant)
    pairs = 12 * 2
    assert saved_bytes(contestant.forward, contestant.given()) == 4 * pairs * 32 + 2 * 8 * pairs + 4 * 4
