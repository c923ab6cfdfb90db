"""`PerGroup`: one balancer for every group of experts, each of which sees its group as if it were a whole layer.

For pools of experts with a router of their own (Slicing and Dicing, arXiv 2605.11689): a fair share is a share of the
pool's tokens, not of the layer's. Losses of the groups are added, as those of layers are.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from himoe.balance.base import Balancer
from himoe.errors import ConfigError
from himoe.functional.groups import Groups
from himoe.types import RouterContext, Routing


class PerGroup(Balancer):
    """Let every group have a balancer of its own.

    Args:
        groups: the partition of the E experts.
        balancers: one per group, for as many experts as the group has.
    """

    parts: Sequence[Balancer]

    def __init__(self, groups: Groups, balancers: Sequence[Balancer]) -> None:
        super().__init__()
        if len(balancers) != groups.num_groups:
            raise ConfigError(f"per_group: {len(balancers)} balancers for {groups.num_groups} groups: give one each")
        self.groups = groups
        self.parts = cast("Sequence[Balancer]", nn.ModuleList(balancers))

    def adjust_logits(self, logits: Float[Tensor, "T E"], context: RouterContext) -> Float[Tensor, "T E"]:
        """Pass every group's columns through its balancer."""
        return self._columns(
            [part.adjust_logits(*self._given(logits, context, g)) for g, part in enumerate(self.parts)]
        )

    def adjust_choice(self, scores: Float[Tensor, "T E"], context: RouterContext) -> Float[Tensor, "T E"]:
        """Pass every group's columns through its balancer."""
        return self._columns(
            [part.adjust_choice(*self._given(scores, context, g)) for g, part in enumerate(self.parts)]
        )

    def losses(self, routing: Routing) -> dict[str, Float[Tensor, ""]]:
        """Return the losses of all groups, those of one name added."""
        total: dict[str, Tensor] = {}
        for g, part in enumerate(self.parts):
            for name, value in part.losses(self.within(routing, g)).items():
                total[name] = total[name] + value if name in total else value
        return total

    def observe(self, routing: Routing) -> None:
        """Let every balancer observe its group."""
        for g, part in enumerate(self.parts):
            part.observe(self.within(routing, g))

    def step(self) -> None:
        """Let every balancer step."""
        for part in self.parts:
            part.step()

    def within(self, routing: Routing, group: int) -> Routing:
        """Return the routing of one group: its columns, its experts counted from 0, the other pairs not selected."""
        logits, context = self._given(routing.logits, routing.context, group)
        members = self._members(group, logits.device)
        place = torch.full((routing.num_experts,), -1, device=logits.device)
        place[members] = torch.arange(len(members), device=logits.device)
        local = place[routing.expert_ids]
        inside = local >= 0
        return replace(
            routing,
            logits=logits,
            scores=routing.scores[:, members],
            expert_ids=local.clamp(min=0),
            selected=routing.selected & inside,
            kept=routing.kept & inside,
            context=context,
            step_counts=None if routing.step_counts is None else routing.step_counts[members],
        )

    def _given(self, values: Tensor, context: RouterContext, group: int) -> tuple[Tensor, RouterContext]:
        members = self._members(group, values.device)
        noise, noise_std, weight = context.noise, context.noise_std, context.gate_weight
        return values[:, members], replace(
            context,
            noise=None if noise is None else noise[:, members],
            noise_std=None if noise_std is None else noise_std[:, members],
            gate_weight=None if weight is None else weight[members],
        )

    def _members(self, group: int, device: torch.device) -> Tensor:
        return torch.tensor(self.groups.members[group], device=device)

    def _columns(self, parts: list[Tensor]) -> Tensor:
        """Put the groups' columns back to their places."""
        order = torch.tensor([expert for group in self.groups.members for expert in group], device=parts[0].device)
        return torch.cat(parts, dim=-1)[:, order.argsort()]
