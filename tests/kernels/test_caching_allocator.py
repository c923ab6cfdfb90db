"""Memory that is kept for the next step: nobody shares it, it is bounded, and the layer is right in what was used."""

import gc
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from expert_case import assert_equal, make_case, run

from himoe.kernels import caching_allocator, empty_cache, expert_mlp, loop, memory_allocated, memory_reserved
from himoe.kernels.caching_allocator import empty

LEAST = 2**16
BYTES, SINGLE = torch.empty(0, dtype=torch.uint8), torch.empty(0)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    """Begin and end a test without blocks that are kept, and without blocks in use of tests before; keep small ones."""
    monkeypatch.setattr(caching_allocator, "LEAST", LEAST)
    gc.collect()
    empty_cache()
    assert memory_allocated() == 0
    yield
    empty_cache()


@pytest.fixture
def two_threads():
    """Compute with two threads in a test."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_freed_block_is_used_again():
    tensor = empty(LEAST, like=BYTES)
    place = tensor.data_ptr()
    assert (memory_allocated(), memory_reserved()) == (LEAST, LEAST)
    del tensor
    assert (memory_allocated(), memory_reserved()) == (0, LEAST)
    again = empty(LEAST // 4, like=SINGLE)
    assert again.data_ptr() == place
    assert again.shape == (LEAST // 4,)
    assert again.dtype == torch.float32
    del again
    empty_cache()
    assert memory_reserved() == 0


def test_a_part_of_a_tensor_keeps_its_block():
    tensor = empty(8, LEAST, like=BYTES)
    row = tensor[3]
    del tensor
    other = empty(8, LEAST, like=BYTES)
    row.fill_(7)
    other.fill_(8)
    assert bool((row == 7).all())
    assert memory_allocated() == 16 * LEAST
    del row
    assert memory_allocated() == 8 * LEAST


@pytest.mark.parametrize(("size", "fits"), [(1.9, True), (1.5, False), (2.1, False)])
def test_a_block_is_taken_where_the_tensor_fits_and_leaves_little_free(size, fits):
    other = empty(4 * LEAST, like=BYTES)  # too large for any of them
    empty(2 * LEAST, like=BYTES)
    del other
    tensor = empty(int(size * LEAST), like=BYTES)
    assert tensor.shape == (int(size * LEAST),)
    assert memory_allocated() == (2 * LEAST if fits else tensor.nbytes)


def test_the_smallest_block_that_fits_is_taken():
    tensors = [empty(size, LEAST, like=BYTES) for size in (12, 10, 11, 13)]
    tensors.clear()
    tensor = empty(21, LEAST // 2, like=BYTES)
    assert memory_allocated() == 11 * LEAST
    assert tensor.nbytes == 10.5 * LEAST


def test_blocks_that_have_waited_longest_are_given_back():
    first, second = empty(8 * LEAST, like=BYTES), empty(4 * LEAST, like=BYTES)
    del first
    memory_allocated()  # notes that it is free
    del second
    tensor = empty(2 * LEAST, like=BYTES)
    assert memory_reserved() == 6 * LEAST  # of 12 once in use: the first went, the second stayed
    del tensor


def test_tensors_in_use_never_share_memory_and_no_more_is_held_than_was_in_use():
    draw = random.Random(0)
    alive, most = {}, 0
    for number in range(400):
        if alive and draw.random() < 0.5:
            key = draw.choice(sorted(alive))
            assert bool((alive[key] == key).all())
            del alive[key]
        else:
            alive[number] = empty(draw.randrange(LEAST, 3 * LEAST) // 4, like=SINGLE).fill_(number)
        most = max(most, memory_allocated())
        assert sum(tensor.nbytes for tensor in alive.values()) <= memory_allocated() <= memory_reserved() <= most
    for key, tensor in alive.items():
        assert bool((tensor == key).all())


def test_blocks_of_sizes_gone_by_are_returned():
    for size in range(1, 20):
        empty(size * LEAST, like=BYTES)
        assert memory_reserved() <= size * LEAST


@pytest.mark.parametrize("changes", [{"HIMOE_KEEP_MEMORY": "0"}, {"deterministic": True}])
def test_nothing_is_kept(changes, monkeypatch):
    torch.use_deterministic_algorithms("deterministic" in changes)
    if "HIMOE_KEEP_MEMORY" in changes:
        monkeypatch.setenv("HIMOE_KEEP_MEMORY", changes["HIMOE_KEEP_MEMORY"])
    try:
        tensor = empty(LEAST, like=SINGLE)
    finally:
        torch.use_deterministic_algorithms(False)
    assert tensor.shape == (LEAST,)
    assert memory_allocated() == memory_reserved() == 0


def test_small_tensors_are_not_kept():
    tensor = empty(3, 5, like=SINGLE)
    assert tensor.shape == (3, 5)
    assert empty(0, 7, like=SINGLE).shape == (0, 7)
    assert memory_reserved() == 0


def test_a_tensor_can_be_what_others_are(tmp_path):
    with torch.no_grad():
        tensor = empty(LEAST // 4, like=SINGLE).fill_(1)
    factor = torch.full((1,), 3.0, requires_grad=True)
    tensor.mul_(factor).sum().backward()  # a view that was made without gradients could not be changed in place
    assert factor.grad.item() == LEAST // 4
    tensor = tensor.detach()
    torch.save(tensor, tmp_path / "tensor.pt")
    assert torch.equal(torch.load(tmp_path / "tensor.pt"), tensor)
    tensor.share_memory_()
    assert bool((tensor == 3).all())


def test_threads_at_once():
    def work(number):
        draw = random.Random(number)
        for _ in range(300):
            tensor = empty(draw.randrange(LEAST, 2 * LEAST) // 4, like=SINGLE).fill_(number)
            assert bool((tensor == number).all())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # seconds: threads take turns in the middle of everything
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)
    gc.collect()
    assert memory_allocated() == 0


def test_the_default_device_changes_nothing():
    with torch.device("meta"):
        tensor = empty(LEAST, like=BYTES)
    assert tensor.fill_(3).sum().item() == 3 * LEAST


@pytest.mark.parametrize("backend", ["native", "loop"])
def test_the_layer_computes_where_its_inputs_are_whatever_the_default_device(backend):
    case = make_case()
    arguments = case.arguments(torch.float32)
    right = expert_mlp(*arguments, backend=backend)
    arguments[0].requires_grad_(), arguments[4].requires_grad_()
    with torch.device("meta"):
        y = expert_mlp(*arguments, backend=backend)
        y.backward(right)
    assert torch.equal(y.detach(), right)
    assert arguments[0].grad.isfinite().all()
    assert arguments[4].grad.isfinite().all()


FORK = """
import os, threading, torch
from himoe.kernels import caching_allocator as memory, empty_cache, memory_allocated
memory.LEAST = 2**16
torch.set_num_threads(1)
like, done = torch.empty(0), threading.Event()
def take():
    while not done.is_set():
        memory.empty(2**14, like=like)
thread = threading.Thread(target=take)
thread.start()
held = memory.empty(2**14, like=like).fill_(1)
codes = []
for _ in range(50):
    child = os.fork()
    if child == 0:
        mine = memory.empty(2**14, like=like).fill_(3)
        good = bool((held == 1).all()) and bool((mine == 3).all()) and memory_allocated() == mine.nbytes
        empty_cache()
        os._exit(not good)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
done.set()
thread.join()
print(any(codes))
"""
EXIT = """
import atexit
held = []
def last():  # runs after weakref's own function at the end
    memory.empty(2**14, like=torch.empty(0)).fill_(2)
    print(all(bool((tensor == 1).all()) for tensor in held[:2]))
atexit.register(last)
import torch
from himoe.kernels import caching_allocator as memory
memory.LEAST = 2**16
held += [memory.empty(2**14, like=torch.empty(0)).fill_(1) for _ in range(2)]
held.append(held)  # alive to the end, in a cycle
"""


@pytest.mark.parametrize(("code", "printed"), [(FORK, "False\n"), (EXIT, "True\n")], ids=["fork", "exit"])
def test_processes_end_well(code, printed):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    warned = [line for line in done.stderr.splitlines() if "Deprecat" not in line and "os.fork" not in line]
    assert (done.stdout, warned, done.returncode) == (printed, [], 0)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("backend", ["native", "loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [{}, {"kept": "all"}, {"kept": "none"}, {"spread": "few"}, {"spread": "one", "k": 1}, {"tokens": 500, "k": 3}],
    ids=str,
)
def test_the_layer_is_right_in_memory_that_was_used(backend, dtype, case, monkeypatch):
    monkeypatch.setattr(caching_allocator, "LEAST", 1)
    monkeypatch.setattr(caching_allocator, "FITS", 10**7)
    monkeypatch.setattr(loop, "SMALL", 0)
    case = make_case(**({"tokens": 70, "num_experts": 6, "k": 2} | case))
    right = run(case, backend="reference")
    for _ in range(2):
        used = [empty(2**22, like=BYTES).fill_(255) for _ in range(30)]  # NaN in every floating dtype
        used.clear()
        assert memory_reserved() >= 30 * 2**22
        found = run(case, backend=backend, dtype=dtype)
        assert_equal(found, right, 1e-4 if dtype == torch.float32 else 5e-2)
