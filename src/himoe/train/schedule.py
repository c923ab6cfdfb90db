"""Learning rate as a pure function of the step: a linear warm-up, then one of five shapes.

Steps are counted from 1: the warm-up reaches the peak at step `warmup_steps`; cosine, linear and wsd reach
`min_ratio · peak` at step `steps`. Both factors are multiplied, so a warm-up that runs into the decay never exceeds
either. Inverse square root and constant do not depend on `steps`, so a run with them can be made longer at any time.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

LearningRate = Callable[[int], float]


def _warmup(step: int, warmup_steps: int) -> float:
    return 1.0 if step >= warmup_steps else step / warmup_steps


def _progress(step: int, steps: int, first: int) -> float:
    """Return how much of the way from step `first` to step `steps` is done, 0 … 1."""
    return min(1.0, max(0, step - first) / max(1, steps - first))


def cosine(step: int, *, steps: int, warmup_steps: int, min_ratio: float) -> float:
    """Return the cosine factor: 1 at the end of the warm-up, `min_ratio` at `steps`.

    >>> [round(cosine(s, steps=10, warmup_steps=2, min_ratio=0.1), 3) for s in (1, 2, 6, 10)]
    [0.5, 1.0, 0.55, 0.1]
    """
    wave = 0.5 * (1.0 + math.cos(math.pi * _progress(step, steps, warmup_steps)))
    return _warmup(step, warmup_steps) * (min_ratio + (1.0 - min_ratio) * wave)


def linear(step: int, *, steps: int, warmup_steps: int, min_ratio: float) -> float:
    """Return the linear factor: 1 at the end of the warm-up, `min_ratio` at `steps`.

    >>> [round(linear(s, steps=10, warmup_steps=2, min_ratio=0.2), 3) for s in (1, 2, 6, 10)]
    [0.5, 1.0, 0.6, 0.2]
    """
    return _warmup(step, warmup_steps) * (1.0 - (1.0 - min_ratio) * _progress(step, steps, warmup_steps))


def wsd(step: int, *, steps: int, warmup_steps: int, min_ratio: float, decay_fraction: float) -> float:
    """Return the warm-up–stable–decay factor: flat, then linear to `min_ratio` over the last `decay_fraction`.

    >>> [round(wsd(s, steps=10, warmup_steps=2, min_ratio=0.0, decay_fraction=0.4), 3) for s in (1, 5, 6, 8, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    decay_steps = max(1, round(decay_fraction * steps))
    return _warmup(step, warmup_steps) * (1.0 - (1.0 - min_ratio) * _progress(step, steps, steps - decay_steps))


def inverse_sqrt(step: int, *, warmup_steps: int, min_ratio: float) -> float:
    """Return √(warmup_steps/step) after the warm-up, never below `min_ratio` (Vaswani et al., 1706.03762).

    >>> [round(inverse_sqrt(s, warmup_steps=4, min_ratio=0.25), 3) for s in (2, 4, 16, 64, 400)]
    [0.5, 1.0, 0.5, 0.25, 0.25]
    """
    decay = math.sqrt(max(1, warmup_steps) / max(step, warmup_steps, 1))
    return _warmup(step, warmup_steps) * max(min_ratio, decay)


def constant(step: int, *, warmup_steps: int) -> float:
    """Return 1 after the warm-up.

    >>> [constant(s, warmup_steps=4) for s in (1, 2, 4, 1000)]
    [0.25, 0.5, 1.0, 1.0]
    """
    return _warmup(step, warmup_steps)


def learning_rate_schedule(
    name: str,
    peak: float,
    *,
    steps: int,
    warmup_steps: int = 0,
    min_ratio: float = 0.1,
    decay_fraction: float = 0.2,
) -> LearningRate:
    """Return `step → learning rate` for `name` "cosine", "linear", "wsd", "inverse_sqrt" or "constant".

    >>> learning_rate_schedule("cosine", 2e-3, steps=10, min_ratio=0.5)(10)
    0.001
    """
    ending = {"steps": steps, "warmup_steps": warmup_steps, "min_ratio": min_ratio}
    shapes: dict[str, tuple[Callable[..., float], dict[str, float]]] = {
        "cosine": (cosine, ending),
        "linear": (linear, ending),
        "wsd": (wsd, {**ending, "decay_fraction": decay_fraction}),
        "inverse_sqrt": (inverse_sqrt, {"warmup_steps": warmup_steps, "min_ratio": min_ratio}),
        "constant": (constant, {"warmup_steps": warmup_steps}),
    }
    shape, options = shapes[name]
    return lambda step: peak * shape(step, **options)


def schedule_of(train: Mapping[str, Any]) -> LearningRate:
    """Return the learning rate that a configuration's `train` table asks for."""
    return learning_rate_schedule(
        train["schedule"],
        train["learning_rate"],
        steps=train["steps"],
        warmup_steps=train["warmup_steps"],
        min_ratio=train["min_learning_rate_ratio"],
        decay_fraction=train["decay_fraction"],
    )
