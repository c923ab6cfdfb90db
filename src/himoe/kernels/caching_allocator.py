"""CPU memory for the experts' large tensors: in pages of 2 MiB, and kept for the next step when it is freed.

Linux gives memory in 4 KiB pages, each zeroed in a fault of its own when it is first written; glibc returns blocks of
32 MiB and more to the system when they are freed, so that every step pays again. Measured on an EPYC with 4 KiB pages:
0.6 ms per MiB first written, 0.12 with 2 MiB pages; writing memory that is there takes 0.08.

Only the tensors made here use what is kept. Blocks in use and kept together are never more than were once in use.
Tensors made with `HIMOE_KEEP_MEMORY=0` are not kept; `empty_cache` gives back what is.
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
LEAST = 2**25  # bytes of a block that is kept: glibc mostly keeps smaller ones itself
FITS = 1.25  # a block is at most so many times as large as the tensor in it: row counts differ from step to step
MADV_HUGEPAGE = 14


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Return the C library's madvise where it knows huge pages; elsewhere memory stays as it comes."""
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def _in_large_pages(tensor: Tensor) -> Tensor:
    """Ask for large pages for new memory; the system may refuse."""
    if tensor.nbytes >= 2 * PAGE and (madvise := _madvise()) is not None:
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

    def take(self, size: int) -> memoryview:
        """Return `size` bytes of a block, which comes back when nobody has them any more."""
        self.collect()
        fitting = [i for i, block in enumerate(self.kept) if size <= block.numel() <= size * FITS]
        if fitting:
            block = self.kept.pop(min(fitting, key=lambda i: self.kept[i].numel()))
        else:
            self.keep_at_most(self.most_in_use - self.in_use - size)
            block = _in_large_pages(torch.empty(size, dtype=torch.uint8, device="cpu"))
        view = block.numpy().data[:size]
        weakref.finalize(view, self.freed.append, block).atexit = False  # who lives to the end still has it
        self.in_use += block.numel()
        self.most_in_use = max(self.most_in_use, self.in_use)
        return view

    def collect(self) -> None:
        """Keep what was freed."""
        while self.freed:
            block = self.freed.popleft()
            self.in_use -= block.numel()
            self.kept.append(block)

    def keep_at_most(self, size: int) -> None:
        """Give blocks back to the system until at most `size` bytes are kept."""
        total = sum(block.numel() for block in self.kept)
        while self.kept and total > size:
            total -= self.kept.pop(0).numel()


_blocks = _Blocks()


def _forget() -> None:
    """Begin anew in a forked child: a thread that it does not have may hold the lock. What is in use stays alive."""
    global _blocks  # noqa: PLW0603
    _blocks = _Blocks()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def empty(*shape: int, like: Tensor) -> Tensor:
    """Return `like.new_empty(shape)`; on a CPU a large one lies in a block that was kept, or in a fresh one.

    The storage of such a tensor cannot be resized, as that of one from NumPy.
    """
    size = math.prod(shape) * like.element_size()
    if not like.is_cpu or torch.are_deterministic_algorithms_enabled():  # which fill new tensors with NaN
        return like.new_empty(shape)
    if size < LEAST or os.environ.get("HIMOE_KEEP_MEMORY", "1") == "0":
        return _in_large_pages(like.new_empty(shape))
    with _blocks.lock:
        view = _blocks.take(size)
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
    """Give all blocks that are kept back to the system."""
    with _blocks.lock:
        _blocks.collect()
        _blocks.kept.clear()
        _blocks.most_in_use = _blocks.in_use
