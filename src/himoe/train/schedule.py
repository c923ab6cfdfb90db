"""Learning rate as a pure function of the step: linear warm-up, then cosine or warm-up–stable–decay.

Steps are counted from 1: the warm-up reaches the peak at step `warmup_steps`, the decay reaches `min_ratio · peak` at
step `steps`. Both factors are multiplied, so a warm-up that runs into the decay never exceeds either.
"""

import math
from collections.abc import Callable

LearningRate = Callable[[int], float]


def _warmup(step: int, warmup_steps: int) -> float:
    return 1.0 if step >= warmup_steps else step / warmup_steps


def cosine(step: int, *, steps: int, warmup_steps: int, min_ratio: float) -> float:
    """Return the cosine factor: 1 at the end of the warm-up, `min_ratio` at `steps`.

    >>> [round(cosine(s, steps=10, warmup_steps=2, min_ratio=0.1), 3) for s in (1, 2, 6, 10)]
    [0.5, 1.0, 0.55, 0.1]
    """
    progress = min(1.0, max(0, step - warmup_steps) / max(1, steps - warmup_steps))
    decay = min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return _warmup(step, warmup_steps) * decay


def wsd(step: int, *, steps: int, warmup_steps: int, min_ratio: float, decay_fraction: float) -> float:
    """Return the warm-up–stable–decay factor: flat, then linear to `min_ratio` over the last `decay_fraction`.

    >>> [round(wsd(s, steps=10, warmup_steps=2, min_ratio=0.0, decay_fraction=0.4), 3) for s in (1, 5, 6, 8, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    decay_steps = max(1, round(decay_fraction * steps))
    progress = min(1.0, max(0, step - (steps - decay_steps)) / decay_steps)
    return _warmup(step, warmup_steps) * (1.0 - (1.0 - min_ratio) * progress)


def learning_rate_schedule(
    name: str,
    peak: float,
    *,
    steps: int,
    warmup_steps: int = 0,
    min_ratio: float = 0.1,
    decay_fraction: float = 0.2,
) -> LearningRate:
    """Return `step → learning rate` for `name` "cosine" or "wsd".

    >>> learning_rate_schedule("cosine", 2e-3, steps=10, min_ratio=0.5)(10)
    0.001
    """
    assert name in ("cosine", "wsd"), name
    common = {"steps": steps, "warmup_steps": warmup_steps, "min_ratio": min_ratio}
    if name == "cosine":
        return lambda step: peak * cosine(step, **common)
    return lambda step: peak * wsd(step, **common, decay_fraction=decay_fraction)
