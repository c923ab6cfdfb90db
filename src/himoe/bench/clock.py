"""Interleaved timing: A B C, B C A, … in one process, so that what else the machine does meets all alike.

Every contestant gets the same share of the time, and so its own number of repeats, at least two. One with few of them
takes part in rounds that are spread over all.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

LEAST, MOST = 2, 200


@dataclass
class Times:
    """Wall-clock and CPU seconds of every repeat; CPU time adds up all threads of the process."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def minimum(self) -> float:
        """Fastest repeat, in seconds."""
        return min(self.wall)

    @property
    def median(self) -> float:
        """Middle repeat, in seconds."""
        return statistics.median(self.wall)

    @property
    def cpu_minimum(self) -> float:
        """Least CPU time of a repeat, in seconds."""
        return min(self.cpu)


def repeats(first: Mapping[str, float], seconds: float) -> dict[str, int]:
    """Share `seconds` out evenly among contestants that took `first` seconds each.

    >>> repeats({"fast": 0.01, "slow": 2.0}, seconds=1.0)
    {'fast': 50, 'slow': 2}
    """
    share = seconds / max(1, len(first))
    return {name: min(MOST, max(LEAST, round(share / max(one, 1e-9)))) for name, one in first.items()}


def order(counts: Mapping[str, int]) -> Iterator[str]:
    """Yield who runs next: in every round all whose turn it is, the first of them another one each time.

    >>> list(order({"a": 4, "b": 2}))
    ['a', 'b', 'a', 'a', 'b', 'a']
    """
    rounds, names = max(counts.values(), default=0), list(counts)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if (number + 1) * counts[name] // rounds > number * counts[name] // rounds:
                yield name


def time_one(step: Callable[[], object], device: str = "cpu") -> tuple[float, float]:
    """Return wall-clock and CPU seconds of one call, the GPU's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def race(
    steps: Mapping[str, Callable[[], object]],
    seconds: float,
    *,
    device: str = "cpu",
    between: Callable[[str], object] = lambda _: None,
) -> dict[str, Times]:
    """Time all steps against each other for about `seconds`; each must have run before, so that nothing is a first.

    Args:
        steps: what to time, by name.
        seconds: shared out evenly; contestants that need more for two repeats take more.
        device: "cpu" or "cuda".
        between: called with the name before every repeat, untimed.
    """
    times = {name: Times() for name in steps}

    def repeat(name: str) -> None:
        between(name)
        wall, cpu = time_one(steps[name], device)
        times[name].wall.append(wall)
        times[name].cpu.append(cpu)

    collects = gc.isenabled()
    gc.disable()
    try:
        for name in steps:
            repeat(name)
        wanted = repeats({name: one.wall[0] for name, one in times.items()}, seconds)
        for name in order({name: count - 1 for name, count in wanted.items()}):
            repeat(name)
    finally:
        if collects:
            gc.enable()
    return times


def matmul_gflops(dtype: torch.dtype, device: str = "cpu") -> float:
    """Return the rate of one square product in GFLOP/s, the best of ten: what the machine reaches at most.

    As large as takes a few milliseconds: some CPUs need a second for a small product in bf16.
    """
    size = 256
    while True:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = partial(torch.mm, left, right)
        product()
        if size == 8192 or time_one(product, device)[0] > 0.005:
            break
        size *= 2
    return 2 * size**3 / min(time_one(product, device)[0] for _ in range(10)) / 1e9
