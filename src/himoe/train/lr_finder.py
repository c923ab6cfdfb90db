"""A learning-rate range test (Smith, arXiv 1506.01186): raise the rate at every step until training breaks.

Where the smoothed loss is lowest the rate is already too high to train with; a tenth of it is a sound highest rate for
a run with a warm-up. The steepest descent is the other common choice, shown beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from himoe.errors import HimoeError
from himoe.train.loop import DivergedError, Trainer

SMOOTHING = 0.9
BROKEN = 1.1
"""A smoothed loss this many times the first one is worse than not training: the test ends."""
BELOW_LOWEST = 10.0
LEAST_STEPS = 10
BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class RangeTest:
    """What a range test saw.

    Attributes:
        rates: learning rate of each step.
        losses: loss of each step, nats per token, measured before its update.
        smoothed: running mean of the losses, the first ones not biased towards 0.
        diverged: whether training broke before the last rate.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    diverged: bool

    @property
    def lowest(self) -> float:
        """The rate at which the smoothed loss was lowest."""
        return self.rates[min(range(len(self.smoothed)), key=self.smoothed.__getitem__)]

    @property
    def steepest(self) -> float:
        """The rate at which the smoothed loss fell most per step, before its lowest point."""
        begin = LEAST_STEPS // 2  # until then the mean is of too few losses
        end = max(begin + 1, self.rates.index(self.lowest) + 1)
        return self.rates[min(range(begin, end), key=lambda i: self.smoothed[i] - self.smoothed[i - 1])]

    @property
    def suggestion(self) -> float:
        """A highest learning rate to train with, to two digits."""
        return float(f"{self.lowest / BELOW_LOWEST:.1e}")

    def as_dict(self) -> dict[str, Any]:
        """Return everything as one JSON document."""
        return {
            "suggestion": self.suggestion,
            "steepest": self.steepest,
            "lowest": self.lowest,
            "diverged": self.diverged,
            "rates": self.rates,
            "losses": self.losses,
            "smoothed": self.smoothed,
        }

    def __str__(self) -> str:
        """Return a table of about ten rows, the curve, and the suggestion."""
        every = max(1, len(self.rates) // 10)
        rows = [
            f"{rate:>13.2e} {loss:>8.4f}" for rate, loss in list(zip(self.rates, self.smoothed, strict=True))[::every]
        ]
        end = f"training broke at {self.rates[-1]:.2e}" if self.diverged else f"not broken at {self.rates[-1]:.2e}"
        return "\n".join(
            [
                "learning rate     loss",
                *rows,
                sparkline(self.smoothed),
                f"steepest at {self.steepest:.2e}, lowest at {self.lowest:.2e}, {end}",
                f"suggestion: train.learning_rate = {self.suggestion:g}, with a warm-up",
            ]
        )


def find_learning_rate(trainer: Trainer, *, start: float = 1e-6, end: float = 1.0, steps: int = 100) -> RangeTest:
    """Raise the learning rate from `start` to `end` in equal factors, one step each, until training breaks.

    The trainer is used up: its weights, optimizer and balancers have moved. Build another one to train.
    Raises HimoeError when training breaks at once.
    """
    assert 0 < start < end and steps >= LEAST_STEPS, f"start = {start}, end = {end}, steps = {steps}"
    first = trainer.steps_done + 1
    trainer.learning_rate = lambda step: start * (end / start) ** ((step - first) / (steps - 1))
    rates, losses, smoothed, diverged = [], [], [], False
    running = 0.0
    for step in range(first, first + steps):
        trainer.means.reset()
        try:
            trainer.step()
        except DivergedError:
            diverged = True
            break
        rates.append(trainer.learning_rate(step))
        losses.append(trainer.means.read()["loss"])
        running = SMOOTHING * running + (1 - SMOOTHING) * losses[-1]
        smoothed.append(running / (1 - SMOOTHING ** len(losses)))
        if smoothed[-1] > BROKEN * smoothed[0]:
            diverged = True
            break
    if len(losses) < LEAST_STEPS:
        raise HimoeError(
            f"the learning-rate test broke after {len(losses)} steps, at a rate of "
            f"{trainer.learning_rate(first + len(losses)):.2e}: "
            "the model does not train at any rate; look at its initial weights and at the data"
        )
    return RangeTest(rates, losses, smoothed, diverged)


def sparkline(values: Sequence[float]) -> str:
    """Return one bar per value, from the smallest to the largest.

    >>> sparkline([1.0, 2.0, 3.0])
    '▁▅█'
    """
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[math.floor((value - low) * scale + 0.5)] for value in values)
