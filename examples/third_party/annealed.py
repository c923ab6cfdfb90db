"""A selection bias whose steps shrink: Loss-Free Balancing (arXiv 2408.15664) with a decaying, proportional rate.

    select the top K of s + b, weights from s alone; after optimizer step t = 0, 1, …, with counts c of selected pairs,
    b += u_t·clip((mean(c) − c)/mean(c), −1, 1)        u_t = rate/√(1 + t/half)

Why: a constant rate is a compromise. Large, the bias goes on shaking when the load is even; small, it takes long to get
there. Steps ∝ 1/√t do both, and their sum still grows without bound, so no imbalance is out of reach.
"""

from typing import ClassVar

import torch

from himoe import Balancer
from himoe.errors import ConfigError
from himoe.functional.stats import selected_load


class AnnealedBias(Balancer):
    """Balance by a selection bias that moves less and less.

    Args:
        num_experts: E.
        rate: u_0, the largest move of the first optimizer step.
        half: optimizer steps after which the moves are 1/√2 as large, ≥ 1.

    State: `bias` (E,) fp32 and the int64 `num_steps`.
    """

    balances_load: ClassVar[bool] = True
    bias: torch.Tensor
    num_steps: torch.Tensor

    def __init__(self, num_experts: int, *, rate: float = 0.02, half: int = 50) -> None:
        super().__init__()
        if rate < 0 or half < 1:
            raise ConfigError(f"annealed: rate = {rate} must be ≥ 0 and half = {half} at least 1")
        self.rate, self.half = rate, half
        self.bias_step = rate  # the largest move: himoe warns where it is large beside the scores
        self.register_buffer("bias", torch.zeros(num_experts))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    def reset_parameters(self):
        """Start from a bias that changes nothing."""
        self.bias.zero_()
        self.num_steps.zero_()

    def adjust_choice(self, scores, context):  # noqa: ARG002
        """Return s + b."""
        return scores + self.bias

    def observe(self, routing):
        """Count the selected pairs."""
        self.accumulate("counts", selected_load(routing))

    def step(self):
        """Move the bias once, by the counts of all micro-batches and ranks."""
        if self.sums:
            counts = self.sums["counts"].double()
            mean = counts.mean().clamp(min=1e-9)
            rate = self.rate / (1 + self.num_steps.double() / self.half).sqrt()
            self.bias.add_((rate * ((counts.mean() - counts) / mean).clamp(-1, 1)).to(self.bias.dtype))
        self.num_steps.add_(1)
