"""Expert threshold routing (Sun et al. 2026): a causal relative of expert choice, one cutoff per expert.

Expert choice lets every expert take the best K/E of the tokens of a batch, so later tokens decide about earlier ones.
Here an expert takes each token whose score exceeds the cutoff that such a choice had in earlier steps:

    take t where s_te > cutoff_e        cutoff_e ← running mean over steps of the 1 − K/E quantile of the scores s_e

`adjust_choice` returns s − cutoff, for the selector `threshold` at 0. Tokens get K experts on average, more or fewer
each, and experts equal loads, as far as the next step's scores resemble the last ones'. The quantile comes from a
histogram per expert of s − cutoff (`functional/histogram.py`), over all micro-batches and ranks of a step.

Deviation: the running mean weighs step t (from 0) by max(1 − β, 1/(t + 1)), the plain mean until the memory of β is
full. A cutoff that started at 0 and moved by 1 − β alone would leave many steps nearly dense; so only the first is.
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from himoe.balance.base import Balancer
from himoe.errors import ConfigError
from himoe.functional.histogram import histogram, quantile
from himoe.types import RouterContext, Routing


class ExpertThreshold(Balancer):
    """Let an expert take the tokens whose score exceeds its running quantile; for the selector `threshold`.

    Args:
        num_experts: E.
        top_k: K, the mean number of experts of a token to reach. K = E leaves the cutoff at its start.
        beta: decay β of the running mean over optimizer steps, in [0, 1).
        start: cutoff of the first step; at 0 every expert of positive score takes every token in it (the selector's
            `max_k` bounds what that costs).

    State: `cutoff` (E,) fp32 and the int64 `num_steps`, steps that saw a token.
    """

    balances_load: ClassVar[bool] = True
    cutoff: Tensor
    num_steps: Tensor

    def __init__(self, num_experts: int, top_k: int, *, beta: float = 0.9, start: float = 0.0) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ConfigError(f"expert_threshold: top_k = {top_k} must be between 1 and num_experts = {num_experts}")
        if not 0 <= beta < 1 or not abs(start) < float("inf"):
            raise ConfigError(f"expert_threshold: beta = {beta} must be in [0, 1), start = {start} finite")
        self.num_experts, self.top_k, self.beta, self.start = num_experts, top_k, beta, start
        self.register_buffer("cutoff", torch.full((num_experts,), float(start), dtype=torch.float32))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Start from the stated cutoff."""
        self.cutoff.fill_(self.start)
        self.num_steps.zero_()

    def adjust_choice(self, scores: Float[Tensor, "T E"], context: RouterContext) -> Float[Tensor, "T E"]:  # noqa: ARG002
        """Return s − cutoff: an expert takes the tokens where it is positive."""
        return scores - self.cutoff

    def observe(self, routing: Routing) -> None:
        """Count how far the scores of real tokens are above the cutoff."""
        if self.top_k < self.num_experts:
            self.accumulate("distances", histogram(routing.scores - self.cutoff, routing.context.mask))

    def step(self) -> None:
        """Move the cutoff towards this step's quantile; a step that saw no token leaves it as it is."""
        if self.sums:
            counts = self.sums["distances"]
            move = quantile(counts, self.num_experts - self.top_k, self.num_experts)
            weight = (1 / (self.num_steps.to(torch.float64) + 1)).clamp(min=1 - self.beta)
            self.cutoff.add_((weight * move).to(self.cutoff.dtype))
            self.num_steps.add_(counts[0].sum().clamp(max=1))
