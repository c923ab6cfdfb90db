"""Memory that is kept for the next step: nobody shares it, it is bounded, and the layer is right in what was used."""

import gc
import random
import subprocess
import sys
import threading

import pytest
import torch
from expert_case import assert_equal, make_case, run

from himoe.kernels import caching_allocator
from himoe.kernels.caching_allocator import LEAST, empty, empty_cache, memory_allocated, memory_reserved

BYTES, SINGLE = torch.empty(0, dtype=torch.uint8), torch.empty(0)


@pytest.fixture(autouse=True)
def nothing_kept():
    """Begin and end a test without blocks that are kept, and without blocks in use of tests before."""
    gc.collect()
    empty_cache()
    assert memory_allocated() == 0
    yield
    empty_cache()


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


@pytest.mark.parametrize("size", [LEAST, 3 * LEAST])
def test_a_block_that_does_not_fit_is_not_taken(size):
    tensor = empty(2 * LEAST, like=BYTES)
    place = tensor.data_ptr()
    kept = torch.empty(0).set_(tensor[:0].view(torch.float32).untyped_storage())  # the address stays taken
    del tensor
    assert empty(size, like=BYTES).data_ptr() != place
    del kept


def test_the_smallest_block_that_fits_is_taken():
    sizes = [1200, 1000, 1100, 1300]
    tensors = [empty(size, 2**14, like=BYTES) for size in sizes]
    places = [tensor.data_ptr() for tensor in tensors]
    tensors.clear()
    assert empty(1050, 2**14, like=BYTES).data_ptr() == places[2]


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
    if changes.pop("deterministic", False):
        torch.use_deterministic_algorithms(True)
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    try:
        tensor = empty(LEAST, like=SINGLE)
    finally:
        torch.use_deterministic_algorithms(False)
    assert tensor.shape == (LEAST,)
    assert memory_reserved() == 0


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
    wrong = []

    def work(number):
        draw = random.Random(number)
        for _ in range(50):
            tensor = empty(draw.randrange(LEAST, 2 * LEAST) // 4, like=SINGLE).fill_(number)
            if not bool((tensor == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    gc.collect()
    assert memory_allocated() == 0


FORK = """
import os, torch
from himoe.kernels import caching_allocator as memory
like = torch.empty(0)
held = memory.empty(2**22, like=like).fill_(1)
memory.empty(2**22, like=like).fill_(2)
memory._blocks.lock.acquire()  # as another thread of the parent may have it
child = os.fork()
if child == 0:
    mine = memory.empty(2**22, like=like).fill_(3)
    os._exit(0 if bool((held == 1).all()) and bool((mine == 3).all()) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
memory._blocks.lock.release()
grad = memory.empty(2**22, like=like)  # alive at the end
"""


def test_a_forked_child_does_not_wait():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("0\n", "", 0)


@pytest.mark.parametrize("backend", ["native", "loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case", [{}, {"kept": "all"}, {"kept": "none"}, {"spread": "few"}, {"spread": "one", "k": 1}], ids=str
)
def test_the_layer_is_right_in_memory_that_was_used(backend, dtype, case, monkeypatch):
    monkeypatch.setattr(caching_allocator, "LEAST", 1)
    monkeypatch.setattr(caching_allocator, "FITS", 1000)
    case = make_case(**({"tokens": 70, "num_experts": 6, "k": 2} | case))
    right = run(case, backend="reference")
    for _ in range(2):
        used = [empty(size, like=BYTES).fill_(255) for size in (10**4,) * 30]  # NaN in every floating dtype
        assert memory_allocated() >= 3 * 10**5
        used.clear()
        found = run(case, backend=backend, dtype=dtype)
        assert_equal(found, right, 1e-4 if dtype == torch.float32 else 5e-2)
