"""The best evaluation during training so far: decides which checkpoint stays, and when training may end early."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass
class Best:
    """Step and bits per byte of the best evaluation, and how many evaluations came since.

    All evaluations during training score the same tokens, so that they compare. The earlier one of two equal ones is
    the better.

    >>> best = Best()
    >>> [best.offer(step, value) for step, value in ((10, 2.0), (20, 1.5), (30, 1.5), (40, 1.75))]
    [True, True, False, False]
    >>> best
    Best(step=20, bits_per_byte=1.5, since=2)
    """

    step: int | None = None
    bits_per_byte: float | None = None
    since: int = 0

    def offer(self, step: int, bits_per_byte: float | None) -> bool:
        """Take note of an evaluation and return whether it is the best so far; None, of no bytes, tells nothing."""
        if bits_per_byte is None:
            return False
        if self.bits_per_byte is not None and bits_per_byte >= self.bits_per_byte:
            self.since += 1
            return False
        self.step, self.bits_per_byte, self.since = step, bits_per_byte, 0
        return True

    def ends_training(self, patience: int | None) -> bool:
        """Return whether as many evaluations in a row as `patience` were no best ones; None never ends it."""
        return patience is not None and self.since >= patience

    def record(self) -> dict[str, Any] | None:
        """Return what checkpoints and summary.json hold; None before the first evaluation."""
        if self.step is None:
            return None
        return {"step": self.step, "bits_per_byte": self.bits_per_byte, "evaluations_since": self.since}

    @classmethod
    def of(cls, record: Mapping[str, Any] | None) -> Self:
        """Return what `record` was of."""
        return cls(record["step"], record["bits_per_byte"], record["evaluations_since"]) if record else cls()
