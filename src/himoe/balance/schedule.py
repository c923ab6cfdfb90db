"""`Schedule`: scales any balancer's losses over the optimizer steps.

The Hi-MoE paper (arXiv 2605.08292) trains all its terms jointly; the authors' code can warm the intra-group term up
linearly; a reading that neither supports has two stages, first the inter-group term alone and then both. All three are
schedules of the same terms, so that an ablation can settle which one matters.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from himoe.balance.base import Balancer
from himoe.errors import ConfigError
from himoe.types import RouterContext, Routing


class Schedule(Balancer):
    """Multiply losses of a balancer by a factor that depends on the optimizer step.

    Args:
        balancer: any balancer; all its hooks stay in force.
        kind: `warmup`, min(step/steps, 1) · `two_stage`, 0 before `steps`, then 1 · `off_after`, 1 before `steps`,
            then 0. `step` counts optimizer steps from 0.
        steps: length of the first part, ≥ 1.
        only: names of the losses to scale; None scales all.
    """

    KINDS = ("warmup", "two_stage", "off_after")
    num_steps: Tensor

    def __init__(self, balancer: Balancer, kind: str, *, steps: int, only: tuple[str, ...] | None = None) -> None:
        super().__init__()
        if kind not in self.KINDS:
            raise ConfigError(f"schedule = {kind!r}: must be one of {', '.join(self.KINDS)}")
        if steps < 1:
            raise ConfigError(f"schedule {kind}: steps = {steps} must be at least 1")
        self.balancer, self.kind, self.steps, self.only = balancer, kind, steps, only
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Start from step 0."""
        self.num_steps.zero_()

    def factor(self) -> Float[Tensor, ""]:
        """Return the factor in force, a scalar on the state's device."""
        if self.kind == "warmup":
            return (self.num_steps.float() / self.steps).clamp(max=1)
        reached = self.num_steps >= self.steps
        return (reached if self.kind == "two_stage" else ~reached).float()

    def adjust_logits(self, logits: Float[Tensor, "T E"], context: RouterContext) -> Float[Tensor, "T E"]:
        """Pass on."""
        return self.balancer.adjust_logits(logits, context)

    def adjust_choice(self, scores: Float[Tensor, "T E"], context: RouterContext) -> Float[Tensor, "T E"]:
        """Pass on."""
        return self.balancer.adjust_choice(scores, context)

    def losses(self, routing: Routing) -> dict[str, Float[Tensor, ""]]:
        """Return the balancer's losses, those named in `only` multiplied by the factor."""
        factor = self.factor()
        return {
            name: value * factor if self.only is None or name in self.only else value
            for name, value in self.balancer.losses(routing).items()
        }

    def observe(self, routing: Routing) -> None:
        """Pass on."""
        self.balancer.observe(routing)

    def step(self) -> None:
        """Let the balancer step and count one optimizer step."""
        self.balancer.step()
        self.num_steps.add_(1)
