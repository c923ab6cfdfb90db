"""The workers of the loop: what they leave as it was, what they raise, and that the layer is right with them."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from expert_case import NAMES, assert_equal, make_case, run

from himoe.kernels import expert_mlp, loop
from himoe.kernels.workers import share_out


@pytest.fixture
def threads():
    """Set the number of threads in a test, and set it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def workers_for_little(monkeypatch):
    """Let the workers do what is otherwise too little for them."""
    monkeypatch.setattr(loop, "SMALL", 0)


def in_new_thread(function):
    """Return what the function returns in a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


CASES = {
    "many experts": {"num_experts": 40, "k": 2, "kept": "all"},
    "some pairs unkept": {"num_experts": 9, "k": 3},
    "half the experts have none": {"num_experts": 8, "k": 3, "spread": "few", "kept": "all"},
    "one expert has everything": {"num_experts": 3, "k": 1, "spread": "one", "kept": "all"},
    "wider than deep": {"num_experts": 9, "k": 3, "width": 24, "units": 40, "activation": "gelu"},
    "nothing kept": {"kept": "none"},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_workers_give_what_one_thread_gives(name, dtype, threads):
    case = make_case(**({"tokens": 300} | CASES[name]))
    results = []
    for count in (1, 2, 3, 3):
        threads(count)
        results.append(run(case, backend="loop", dtype=dtype))
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 2e-2)
    for result in results[1:]:
        assert_equal(result, results[0], tolerance)
    (y, grads), (y_again, grads_again) = results[2:]
    assert torch.equal(y, y_again) and all(torch.equal(grads[n], grads_again[n]) for n in NAMES)


def test_every_thread_keeps_its_number_of_threads(threads):
    threads(3)
    in_new_thread(lambda: torch.set_num_threads(4))  # what new threads take is 4 from here, this one keeps 3
    inside = []
    share_out(lambda _, __: inside.append(torch.get_num_threads()), range(20), [None] * 3)
    assert inside == [1] * 20
    assert torch.get_num_threads() == 3
    assert in_new_thread(torch.get_num_threads) == 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_of_the_caller_reach_the_workers(mode, threads):
    x, *rest = make_case(tokens=60, kept="all").arguments(torch.float32)
    results = []
    for count in (1, 2):
        threads(count)
        with mode():
            results.append(expert_mlp(x.requires_grad_(), *rest, backend="loop"))
    assert torch.equal(*results) and results[0].requires_grad == results[1].requires_grad
    assert results[0].is_inference() == results[1].is_inference()


def test_what_a_task_raises_is_raised_and_the_workers_live_on():
    done, started = [], threading.Barrier(2, timeout=20)

    def do(task, _):
        started.wait()  # both workers have a task
        if task == 0:
            raise ValueError("task 0")
        time.sleep(0.2)
        done.append(task)

    with pytest.raises(ValueError, match="task 0"):
        share_out(do, range(9), [None] * 2)
    assert done == [1]  # the other one was waited for, and nobody took a third
    share_out(lambda task, space: space.append(task), range(50), spaces := [[], []])
    assert sorted(spaces[0] + spaces[1]) == list(range(50))


def test_threads_of_the_program_share_the_workers(threads):
    threads(2)
    case = make_case(tokens=200, num_experts=6, k=2, kept="all")
    expected, results = run(case, backend="loop", dtype=torch.float32), []

    def call():
        torch.set_num_threads(2)
        results.extend(run(case, backend="loop", dtype=torch.float32) for _ in range(4))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 12
    assert all(torch.equal(y, expected[0]) and torch.equal(g["x"], expected[1]["x"]) for y, g in results)


def test_results_repeat_bit_for_bit_whoever_takes_a_batch(threads):
    threads(2)
    case = make_case(tokens=1000, width=257, units=33, num_experts=512, k=3, kept="all")
    first, *others = (run(case, backend="loop", dtype=torch.float32) for _ in range(5))
    for y, gradients in others:
        assert torch.equal(y, first[0]) and all(torch.equal(gradients[n], first[1][n]) for n in NAMES)


FORK = """
import atexit, os, threading, torch
from himoe.kernels import expert_mlp, loop
torch.set_num_threads(2)
x, ids = torch.randn(300, 32), torch.randint(0, 9, (300, 2))
arguments = (x, ids, torch.rand(300, 2), ids >= 0, torch.randn(9, 64, 32), torch.randn(9, 32, 32))
loop.SMALL = 0
def again():
    return expert_mlp(*arguments, backend="loop")
expected = again()
child = os.fork()
if not child:
    os._exit(not torch.equal(again(), expected))
print(os.waitpid(child, 0)[1], threading.active_count() > 1)
atexit.register(lambda: print(torch.equal(again(), expected)))
"""


def test_a_forked_child_has_workers_of_its_own_and_the_end_of_a_program_needs_none():
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", FORK], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "True", "True"]
