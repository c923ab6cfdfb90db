"""Hi-MoE's inter-group load correction (arXiv 2605.08292, section 3): subtract a running mean of the logits.

    mean ← β·mean + (1 − β)·mean_tokens g(x)          corrected = (g(x) − τ·mean) / temperature

The mean starts at 0 without bias correction and has no gradient. The paper and the authors' code use a mean that
already includes the batch being routed (`same_batch`): later tokens then move earlier ones, so that form is not causal
in a language model, and it differs per rank. The default (`previous`) uses the mean of the last optimizer step.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from himoe.balance.base import Balancer
from himoe.errors import ConfigError
from himoe.functional.masked import masked_mean, masked_sum, token_count
from himoe.types import RouterContext, Routing


class LogitCorrection(Balancer):
    """Route on logits minus τ times their running mean.

    Args:
        num_experts: E.
        tau: strength τ of the correction, 0.01 in the paper.
        beta: decay β of the running mean, in [0, 1).
        temperature: divides the corrected logits.
        mean_from: `previous` step or `same_batch`, see above. In eval both use the stored mean.

    State: `mean_logits` (E,) fp32.
    """

    mean_logits: Tensor
    causal_reason = "the mean of the same batch holds later tokens; mean_from = previous is causal"

    def __init__(
        self,
        num_experts: int,
        *,
        tau: float = 0.01,
        beta: float = 0.9,
        temperature: float = 1.0,
        mean_from: str = "previous",
    ) -> None:
        super().__init__()
        if mean_from not in ("previous", "same_batch"):
            raise ConfigError(f"logit_correction: mean_from = {mean_from!r} must be previous or same_batch")
        if not (0 <= beta < 1 and 0 < temperature < float("inf") and abs(tau) < float("inf")):
            raise ConfigError(
                f"logit_correction: tau = {tau} must be finite, beta = {beta} in [0, 1), temperature = {temperature} "
                "above 0 and finite"
            )
        self.tau, self.beta, self.temperature, self.mean_from = tau, beta, temperature, mean_from
        self.causal = mean_from == "previous"
        self.register_buffer("mean_logits", torch.zeros(num_experts, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Start from a mean of 0."""
        self.mean_logits.zero_()

    def adjust_logits(self, logits: Float[Tensor, "T E"], context: RouterContext) -> Float[Tensor, "T E"]:
        """Return (logits − τ·mean)/temperature; with `same_batch` the mean is computed here and stored in `step`."""
        mean = self.mean_logits
        if self.mean_from == "same_batch" and context.training:
            mean = self.beta * mean + (1 - self.beta) * masked_mean(logits.detach(), context.mask)
        return (logits - self.tau * mean) / self.temperature

    def observe(self, routing: Routing) -> None:
        """Sum the logits of real tokens."""
        logits, mask = routing.logits.to(torch.float64), routing.context.mask
        self.accumulate("logits", masked_sum(logits, mask))
        self.accumulate("tokens", token_count(logits, mask))

    def step(self) -> None:
        """Move the mean once; a step that saw no token leaves it as it is."""
        if self.sums:
            tokens = self.sums["tokens"]
            mean = (self.sums["logits"] / tokens.clamp(min=1)).to(self.mean_logits.dtype)
            moved = self.beta * self.mean_logits + (1 - self.beta) * mean
            self.mean_logits.copy_(torch.where(tokens > 0, moved, self.mean_logits))
