"""Loss-Free Balancing (arXiv 2408.15664): a bias per expert moves the choice, never the weights.

    select the top K of s + b, weights from s alone; after each optimizer step, with counts c of selected pairs,

| update | b += |
|---|---|
| `sign` | u·sign(mean(c) − c) |
| `proportional` | u·(mean(c) − c)/mean(c) |
| `rms` | u·e/RMS(e), e = mean(c) − c |

Counts are summed over micro-batches and ranks; padding and eval are excluded. `centred` subtracts the mean of each
move. `multiplicative` ranks by s·b instead, b starting at 1 and kept positive. DeepSeek-V3 lets the bias stand still in
the last part of training: `Schedule(…, "off_after", scales="moves")` does that.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from himoe.balance.base import Balancer
from himoe.errors import ConfigError
from himoe.functional.stats import selected_load
from himoe.types import RouterContext, Routing


class LossFree(Balancer):
    """Balance by a selection bias instead of a loss.

    Args:
        num_experts: E.
        rate: u per optimizer step. It is added to scores: for softmax scores, about 1/E in size, choose it well below.
        update: `sign` (the paper), `proportional` or `rms`.
        centred: keep the sum of the biases where it is.
        multiplicative: rank by s·b; needs positive scores.

    State: `bias` (E,) fp32.
    """

    balances_load: ClassVar[bool] = True
    toy_options: ClassVar[Mapping[str, Any]] = {"rate": 0.01}
    bias: Tensor

    def __init__(
        self,
        num_experts: int,
        *,
        rate: float = 1e-3,
        update: str = "sign",
        centred: bool = False,
        multiplicative: bool = False,
    ) -> None:
        super().__init__()
        if update not in ("sign", "proportional", "rms"):
            raise ConfigError(f"loss_free: update = {update!r} must be sign, proportional or rms")
        if not 0 <= rate < float("inf"):
            raise ConfigError(f"loss_free: rate = {rate} must be ≥ 0 and finite")
        self.rate, self.update, self.centred, self.multiplicative = rate, update, centred, multiplicative
        self.bias_step, self.bias_multiplies = rate, multiplicative  # of the other updates, the typical size
        start = torch.full((num_experts,), float(multiplicative), dtype=torch.float32)
        self.register_buffer("bias", start)

    def reset_parameters(self) -> None:
        """Start from a bias that changes nothing: 0, or 1 when multiplicative."""
        self.bias.fill_(float(self.multiplicative))

    def adjust_choice(self, scores: Float[Tensor, "T E"], context: RouterContext) -> Float[Tensor, "T E"]:  # noqa: ARG002
        """Return s + b, or s·b when multiplicative."""
        if scores.shape[-1] != self.bias.numel():
            raise ConfigError(
                f"loss_free: made for num_experts = {self.bias.numel()}, but the router has {scores.shape[-1]}"
            )
        return scores * self.bias if self.multiplicative else scores + self.bias

    def adds_to_choice(self) -> list[Float[Tensor, " E"]] | None:
        """Return b, where it is added."""
        changed = type(self).adjust_choice is not LossFree.adjust_choice
        return None if changed or self.multiplicative else [self.bias]

    def observe(self, routing: Routing) -> None:
        """Count the selected pairs."""
        self.accumulate("counts", selected_load(routing))

    def step(self) -> None:
        """Move the bias once, against the excess of each expert."""
        if self.sums:
            self.bias.add_(self._move(self.sums["counts"]).to(self.bias.dtype))
            if self.multiplicative:
                self.bias.clamp_(min=torch.finfo(self.bias.dtype).eps)

    def _move(self, counts: Tensor) -> Tensor:
        total = counts.sum()
        deficit = total - counts * counts.numel()  # E·(mean − c), exact in integers: equal counts move nothing
        if self.update == "sign":
            move = deficit.sign().to(torch.float64)
        else:
            deficit = deficit.to(torch.float64)
            scale = total if self.update == "proportional" else deficit.square().mean().sqrt()
            move = torch.where(scale > 0, deficit / scale, 0.0)
        return self.rate * (move - move.mean() if self.centred else move)
