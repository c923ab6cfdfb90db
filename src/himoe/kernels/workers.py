"""Threads that share out a list of tasks, each computing with one thread of torch's inside.

A product of a few hundred rows is too small to be split: two threads that compute two products wait for each other
once at the end, two that split every product wait at the end of each. torch lets go of Python's lock while it computes.
What a task writes must be its own, so that the results do not depend on the number of workers.

OpenMP's threads look for more to do for some 8 ms after an operation that used them, and take a worker's core for so
long. So what surrounds the tasks is best made of operations that use one thread: `index_select` and `scatter_` do for
a few thousand numbers, `[]` with a tensor does not.
"""

import ctypes
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from himoe.kernels.libtorch import symbol

Task = TypeVar("Task")
Space = TypeVar("Space")


def _compute_alone() -> None:
    """Give this thread one thread of torch's; `torch.set_num_threads` would change what other new threads take, too."""
    torch.get_num_threads()  # asked for the first time in a thread, it sets that thread's number
    for name in ("omp_set_num_threads", "MKL_Set_Num_Threads_Local"):
        if (address := symbol(name)) is not None:
            ctypes.CFUNCTYPE(None, ctypes.c_int)(address)(1)


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:  # noqa: ARG001 - a forked child has none of its parent's
    pool = ThreadPoolExecutor(threads, "himoe", initializer=_compute_alone)
    everybody = threading.Barrier(threads, timeout=10)  # seconds, should some not start
    wait([pool.submit(everybody.wait) for _ in range(threads)])  # a fork from here on finds none half set up
    return pool


def share_out(do: Callable[[Task, Space], None], tasks: Iterable[Task], spaces: Sequence[Space]) -> None:
    """Call do(task, space) for every task, in their order but `len(spaces)` at a time, each with a space of its own.

    With one space it is a plain loop. Callers in several threads share the workers; a task must not call this itself.
    Workers record no gradients. What a task raises ends its worker's part, and is raised once nobody works any more.
    """
    if len(spaces) == 1:
        for task in tasks:
            do(task, spaces[0])
        return
    left = deque(tasks)

    def work(space: Space) -> None:
        with torch.inference_mode():  # whose tensors only it may change; it changes others as well
            while left:
                try:
                    task = left.popleft()
                except IndexError:  # another was faster
                    return
                do(task, space)

    running: list[Future[None]] = []
    try:
        try:
            pool = _pool(max(torch.get_num_threads(), len(spaces)), os.getpid())
            for space in spaces:
                running.append(pool.submit(work, space))
        except RuntimeError:  # the interpreter is shutting down or can start no thread: others or this one do it all
            if not running:
                work(spaces[0])
        for future in running:
            future.result()
    finally:
        left.clear()
        wait(running)
        running.clear()  # an error holds this frame, and with it the futures' spaces
