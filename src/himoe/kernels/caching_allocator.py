"""Large blocks of CPU memory in 2 MiB pages, kept for the next step when they are freed, as PyTorch does on a GPU.

Linux gives memory in 4 KiB pages, each zeroed in a fault of its own when it is first written; PyTorch returns blocks of
32 MiB and more to the system when they are freed, so every step pays again. Measured on an EPYC with 4 KiB pages:
0.6 ms per MiB first written, 0.12 with 2 MiB pages; writing memory that is there takes 0.08.

Blocks in use and blocks kept are together never more than what was in use at one time. With `HIMOE_KEEP_MEMORY=0`
nothing is kept; `empty_cache` returns what is.
"""

import ctypes
import functools
import math
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

PAGE = 2**21
LEAST = 2 * PAGE  # bytes: what is smaller comes from PyTorch as ever
FITS = 1.25  # a block is used again for a tensor that leaves at most a fifth of it free
MADV_HUGEPAGE, PYBUF_WRITE = 14, 0x200


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Return the C library's madvise where it knows huge pages; elsewhere memory stays as it comes."""
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


@functools.cache
def _memoryview() -> Callable[[int, int, int], memoryview]:
    function = ctypes.pythonapi.PyMemoryView_FromMemory
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int], ctypes.py_object
    return function


def _in_large_pages(tensor: Tensor) -> Tensor:
    """Ask for large pages for new memory; the system may refuse."""
    if (madvise := _madvise()) is not None:
        start, end = -(-tensor.data_ptr() // PAGE) * PAGE, (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE
        madvise(start, end - start, MADV_HUGEPAGE)
    return tensor


class _Blocks:
    """Blocks in use, which are only counted, and blocks that are kept."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.freed: deque[Tensor] = deque()  # a tensor may die in any thread, also in one that has the lock
        self.kept: list[Tensor] = []  # who has waited longest comes first
        self.in_use = self.most_in_use = 0  # bytes

    def take(self, size: int) -> Tensor:
        """Return a block of at least `size` bytes: the smallest that fits, of those the one last used."""
        self.collect()
        fitting = [i for i, block in enumerate(self.kept) if size <= block.numel() <= size * FITS]
        if fitting:
            block = self.kept.pop(min(fitting, key=lambda i: (self.kept[i].numel(), -i)))
        else:
            self.keep_at_most(max(self.most_in_use - self.in_use - size, 0))
            block = _in_large_pages(torch.empty(size, dtype=torch.uint8))
        self.in_use += block.numel()
        self.most_in_use = max(self.most_in_use, self.in_use)
        return block

    def collect(self) -> None:
        """Keep what was freed."""
        while self.freed:
            block = self.freed.popleft()
            self.in_use -= block.numel()
            self.kept.append(block)

    def keep_at_most(self, size: int) -> None:
        """Return blocks to the system until at most `size` bytes are kept."""
        total = sum(block.numel() for block in self.kept)
        while total > size:
            total -= self.kept.pop(0).numel()


_blocks = _Blocks()


def empty(*shape: int, like: Tensor) -> Tensor:
    """Return `like.new_empty(shape)`; a large one on a CPU lies in a block that was kept, or in a fresh one.

    Its storage cannot be resized, as that of a tensor from NumPy.
    """
    size = math.prod(shape) * like.element_size()
    if size < LEAST or not like.is_cpu or torch.are_deterministic_algorithms_enabled():  # which fill it with NaN
        return like.new_empty(shape)
    # Nobody waits for the lock: a forked child might for ever, if another thread of its parent had it.
    if os.environ.get("HIMOE_KEEP_MEMORY", "1") == "0" or not _blocks.lock.acquire(blocking=False):
        return _in_large_pages(like.new_empty(shape))
    try:
        block = _blocks.take(size)
    finally:
        _blocks.lock.release()
    view = _memoryview()(block.data_ptr(), size, PYBUF_WRITE)  # the tensor's storage holds it until it dies
    weakref.finalize(view, _blocks.freed.append, block).atexit = False
    # Not view: a view made where no gradients are recorded could not be changed in place where they are.
    return torch.frombuffer(view, dtype=like.dtype).resize_(shape)


def memory_allocated() -> int:
    """Return the bytes of all blocks in use."""
    with _blocks.lock:
        _blocks.collect()
        return _blocks.in_use


def memory_reserved() -> int:
    """Return the bytes of all blocks, in use or kept."""
    with _blocks.lock:
        _blocks.collect()
        return _blocks.in_use + sum(block.numel() for block in _blocks.kept)


def empty_cache() -> None:
    """Return all blocks that are kept to the system."""
    with _blocks.lock:
        _blocks.collect()
        _blocks.kept.clear()
        _blocks.most_in_use = _blocks.in_use
