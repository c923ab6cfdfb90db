"""φ-balancing (arXiv 2605.15403): evens out the expected probabilities, not those of one batch.

    weight·⟨mean p, ∇φ(m)⟩        ∇φ(m) = log m + 1, no gradient through it        m ← (1 − η)·m + η·mean p

m, a running mean of the probabilities, starts at 1/E and moves once per optimizer step, by the mean over all real
tokens of the step on all ranks. φ is the negative entropy Σ m log m. At balance m = 1/E, and the value is exactly
weight·(1 − log E), a negative number, whatever the batch; only its gradient matters. The loss is linear in the
probabilities, so that micro-batches of one size give the loss of the undivided batch.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from himoe.balance.base import Balancer
from himoe.errors import ConfigError
from himoe.functional.gate_losses import potential_slope
from himoe.functional.losses import probabilities
from himoe.functional.masked import masked_mean, masked_sum, token_count
from himoe.types import Routing


class Phi(Balancer):
    """Add `phi`, which evens out the expected probabilities.

    Args:
        num_experts: E.
        weight: near balance the gradient is that of `switch` with the same weight.
        rate: η in (0, 1]; 1 takes the last step's mean. The default is ours.
        source: whose mean is taken: `corrected`, the scores divided by their sum, or `raw`, softmax of the gate's
            logits.

    State: `mean_probabilities` (E,) fp32.
    """

    balances_load: ClassVar[bool] = True
    toy_options: ClassVar[Mapping[str, Any]] = {"weight": 1.0}
    loss_names: ClassVar[tuple[str, ...]] = ("phi",)
    mean_probabilities: Tensor

    def __init__(
        self, num_experts: int, *, weight: float = 0.01, rate: float = 0.05, source: str = "corrected"
    ) -> None:
        super().__init__()
        if not 0 <= weight < float("inf") or source not in ("raw", "corrected"):
            raise ConfigError(f"phi: weight = {weight} must be ≥ 0 and finite, source = {source!r} raw or corrected")
        if not 0 < rate <= 1:
            raise ConfigError(f"phi: rate = {rate} must be above 0 and at most 1")
        self.weight, self.rate, self.source = weight, rate, source
        self.alpha = weight
        self.register_buffer("mean_probabilities", torch.full((num_experts,), 1 / num_experts, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Start from 1/E."""
        self.mean_probabilities.fill_(1 / self.mean_probabilities.numel())

    def losses(self, routing: Routing) -> dict[str, Float[Tensor, ""]]:
        """Return the weighted loss of this layer."""
        mean = masked_mean(probabilities(routing, self.source), routing.context.mask)
        slope = potential_slope(self.mean_probabilities.to(mean.dtype))
        return {"phi": self.weight * (mean * slope).sum()}

    def observe(self, routing: Routing) -> None:
        """Sum the probabilities of real tokens."""
        p, mask = probabilities(routing, self.source).to(torch.float64), routing.context.mask
        self.accumulate("probabilities", masked_sum(p, mask))
        self.accumulate("tokens", token_count(p, mask))

    def step(self) -> None:
        """Move the running mean once; a step that saw no token leaves it as it is."""
        if self.sums:
            tokens, old = self.sums["tokens"], self.mean_probabilities
            mean = (self.sums["probabilities"] / tokens.clamp(min=1)).to(old.dtype)
            old.copy_(torch.where(tokens > 0, (1 - self.rate) * old + self.rate * mean, old))
