"""`Schedule`: scales any balancer's losses, or the moves of its state, over the optimizer steps.

The Hi-MoE paper (arXiv 2605.08292) trains all its terms jointly; the authors' code can warm the intra-group term up; a
reading that neither supports has two stages, first the inter-group term alone. An ablation can settle which matters.

Controllers have no losses but a state that moves once per step. DeepSeek-V3 (arXiv 2412.19437) stops its bias for the
last part of training: `off_after` on the moves. The same way `warmup` ramps the rate of any controller.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from himoe.balance.base import Balancer
from himoe.errors import ConfigError
from himoe.types import RouterContext, Routing


class Schedule(Balancer):
    """Multiply a balancer's losses, or the moves of its state, by a factor that depends on the optimizer step.

    Args:
        balancer: any balancer; all its hooks stay in force.
        kind: `warmup`, min(step/steps, 1) · `two_stage`, 0 before `steps`, then 1 · `off_after`, 1 before `steps`,
            then 0. `step` counts optimizer steps from 0.
        steps: length of the first part, ≥ 1.
        scales: `losses`, or `moves`: each optimizer step then takes the floating-point state from `before` only to
            before + factor·(after − before); integers, which count, move as they are. None: the losses of a balancer
            that has some, else its moves.
        only: names of the losses to scale; None scales all.

    Raises:
        ConfigError: options out of range, or a balancer without that which is to be scaled.
    """

    passes_on = True
    KINDS = ("warmup", "two_stage", "off_after")
    SCALES = ("losses", "moves")
    num_steps: Tensor

    def __init__(
        self,
        balancer: Balancer,
        kind: str,
        *,
        steps: int,
        scales: str | None = None,
        only: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        if kind not in self.KINDS:
            raise ConfigError(f"schedule = {kind!r}: must be one of {', '.join(self.KINDS)}")
        if steps < 1:
            raise ConfigError(f"schedule {kind}: steps = {steps} must be at least 1")
        parts = [part for part in balancer.modules() if isinstance(part, Balancer) and not part.passes_on]
        lossy = [part for part in parts if type(part).losses is not Balancer.losses]
        named = {name for part in lossy for name in part.loss_names}
        if only is not None and all(part.loss_names for part in lossy) and not named.issuperset(only):
            raise ConfigError(f"schedule {kind}: only = {only!r} must be some of ({', '.join(sorted(named))})")
        has = {"losses": bool(lossy), "moves": any(map(_moves, parts))}
        if scales is None:
            scales = "losses" if has["losses"] or only is not None else "moves"
        if scales not in self.SCALES:
            raise ConfigError(f"schedule {kind}: scales = {scales!r} must be one of {', '.join(self.SCALES)}")
        if scales == "moves" and only is not None:
            raise ConfigError(f"schedule {kind}: only = {only} names losses; leave it out with scales = 'moves'")
        if not has[scales]:
            name = type(balancer).__name__
            other = next((f"; it has {key}, so give scales = {key!r}" for key in self.SCALES if has[key]), "")
            raise ConfigError(f"schedule {kind}: scales = {scales!r}, but {name} has no {scales} to scale{other}")
        self.balancer, self.kind, self.steps, self.scales, self.only = balancer, kind, steps, scales, only
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

    def adds_to_choice(self) -> list[Float[Tensor, " E"]] | None:
        """Pass on."""
        return self.balancer.adds_to_choice()

    def losses(self, routing: Routing) -> dict[str, Float[Tensor, ""]]:
        """Return the balancer's losses, multiplied by the factor where they are what is scaled."""
        if self.scales == "moves":
            return self.balancer.losses(routing)
        factor = self.factor()
        return {
            name: value * factor if self.only is None or name in self.only else value
            for name, value in self.balancer.losses(routing).items()
        }

    def observe(self, routing: Routing) -> None:
        """Pass on."""
        self.balancer.observe(routing)

    def step(self) -> None:
        """Let the balancer step, as far as the factor allows where moves are scaled, and count one optimizer step."""
        if self.scales == "moves":
            state = [buffer for buffer in self.balancer.buffers() if buffer.is_floating_point()]
            before, factor = [buffer.clone() for buffer in state], self.factor()
            self.balancer.step()
            for buffer, old in zip(state, before, strict=True):
                buffer.copy_(torch.lerp(old, buffer, factor.to(buffer.dtype)))  # exact at factors 0 and 1
        else:
            self.balancer.step()
        self.num_steps.add_(1)


def _moves(part: Balancer) -> bool:
    """Return whether a step moves state that is not a count."""
    return type(part).step is not Balancer.step and any(buffer.is_floating_point() for buffer in part.buffers())
