"""SMEBU, the soft-clamped momentum update of the selection bias in Arcee Trinity Large (arXiv 2602.17004).

With counts c of selected pairs, summed over the micro-batches and ranks of an optimizer step,

    v = (mean(c) − c)/mean(c)        d = λ·tanh(κ·v), its mean taken off        m ← β·m + (1 − β)·d        b += m

Experts are chosen by s + b, weights come from s alone, as in Loss-Free Balancing. Where that jumps by ±u however near
balance is, a move here shrinks with the imbalance, and the momentum damps what single batches say.
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


class Momentum(Balancer):
    """Balance by a selection bias with soft-clamped moves and momentum (SMEBU).

    Args:
        num_experts: E.
        rate: λ, the largest move of an optimizer step before the mean is taken off; it is added to scores.
        kappa: κ > 0, how early tanh bends: moves are about λ·κ·v for a relative deficit v well below 1/κ.
        beta: decay β of the momentum, in [0, 1).

    State: `bias` and `momentum`, (E,) fp32 each.
    """

    balances_load: ClassVar[bool] = True
    toy_options: ClassVar[Mapping[str, Any]] = {"rate": 0.01}
    bias: Tensor
    momentum: Tensor

    def __init__(self, num_experts: int, *, rate: float = 5e-4, kappa: float = 2.0, beta: float = 0.5) -> None:
        super().__init__()
        if not 0 <= rate < float("inf") or not 0 < kappa < float("inf") or not 0 <= beta < 1:
            raise ConfigError(
                f"momentum: rate = {rate} must be ≥ 0 and finite, kappa = {kappa} above 0 and finite, "
                f"beta = {beta} in [0, 1)"
            )
        self.rate, self.kappa, self.beta = rate, kappa, beta
        self.bias_step = rate
        for name in ("bias", "momentum"):
            self.register_buffer(name, torch.zeros(num_experts, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Start from a bias and a momentum of 0."""
        self.bias.zero_()
        self.momentum.zero_()

    def adjust_choice(self, scores: Float[Tensor, "T E"], context: RouterContext) -> Float[Tensor, "T E"]:  # noqa: ARG002
        """Return s + b."""
        if scores.shape[-1] != self.bias.numel():
            raise ConfigError(
                f"momentum: made for num_experts = {self.bias.numel()}, but the router has {scores.shape[-1]}"
            )
        return scores + self.bias

    def adds_to_choice(self) -> list[Float[Tensor, " E"]] | None:
        """Return b."""
        return [self.bias] if type(self).adjust_choice is Momentum.adjust_choice else None

    def observe(self, routing: Routing) -> None:
        """Count the selected pairs."""
        self.accumulate("counts", selected_load(routing))

    def step(self) -> None:
        """Move the momentum, then the bias by it; a step that selected nothing leaves both as they are."""
        if self.sums:
            counts = self.sums["counts"]
            total = counts.sum()
            deficit = (total - counts * counts.numel()).to(torch.float64) / total.clamp(min=1)  # (mean − c)/mean
            move = self.rate * (self.kappa * deficit).tanh()
            move = (move - move.mean()).to(self.momentum.dtype)
            momentum = torch.lerp(move, self.momentum, self.beta)
            self.momentum.copy_(torch.where(total > 0, momentum, self.momentum))
            self.bias.add_(self.momentum * (total > 0))
