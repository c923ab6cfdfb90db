"""How much memory a step takes: its peak, and what it keeps between forward and backward.

The peak is above what was held before the step, so inputs and weights are not in it, while output, saved tensors and
gradients are. On a CPU it is summed up from the events of PyTorch's own allocator, which the profiler records, with no
blocks kept from steps before (`kernels/caching_allocator.py`); scratch that a library allocates by itself, as BLAS
does, is not seen, whoever calls it. On a GPU it is the allocator's peak.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from himoe.kernels import caching_allocator


def peak_bytes(step: Callable[[], object], device: str = "cpu") -> int:
    """Return the largest number of bytes that `step` held at one time beyond those held before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    caching_allocator.empty_cache()
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        step()
    assert recording.profiler is not None and recording.profiler.kineto_results is not None
    events = [event for event in recording.profiler.kineto_results.events() if event.name() == "[memory]"]
    return highest(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))  # type: ignore[attr-defined]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the profiler's notes of its start and its end, which it writes from C++, off standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - a descriptor is needed
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def highest(changes: Iterable[int]) -> int:
    """Return the highest level that changes reach, from 0.

    >>> highest([100, 50, -100, 20])
    150
    """
    level = top = 0
    for change in changes:
        level += change
        top = max(top, level)
    return top


def saved_bytes(forward: Callable[[], object], given: Iterable[Tensor]) -> int:
    """Return the bytes that `forward` saves for backward, each storage once and those of `given` not at all."""
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        forward()  # the result is dropped only here, so no storage is used twice
    return sum(saved.values())
