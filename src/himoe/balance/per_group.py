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

from himoe.balance.base import STEP_COUNTS, Balancer
from himoe.errors import ConfigError
from himoe.functional.constants import numbers_on
from himoe.functional.groups import Groups
from himoe.functional.stats import selected_load
from himoe.types import RouterContext, Routing


class PerGroup(Balancer):
    """Let every group have a balancer of its own.

    Args:
        groups: the partition of the E experts, of any sizes and in any order.
        balancers: one per group, for as many experts as the group has.

    The losses of a group are those of a layer with the group's experts alone: its columns of logits, scores, noise and
    of the gate's matrix, its experts counted from 0 in the order in which the group lists them. Combine weights, and
    the scores that `adjust_choice` moves, stay as the layer made them: softmax scores are shares of the whole layer.
    """

    passes_on = True
    parts: Sequence[Balancer]

    def __init__(self, groups: Groups, balancers: Sequence[Balancer]) -> None:
        super().__init__()
        if len(balancers) != groups.num_groups:
            raise ConfigError(f"per_group: {len(balancers)} balancers for {groups.num_groups} groups: give one each")
        if len(set(balancers)) != len(balancers):
            raise ConfigError("per_group: two groups share a balancer, whose state would mix them: build one for each")
        self.groups = groups
        self.parts = cast("Sequence[Balancer]", nn.ModuleList(balancers))
        inner = [part for balancer in balancers for part in balancer.modules() if isinstance(part, Balancer)]
        self.needs_step_counts = any(part.needs_step_counts for part in inner)
        self._columns = [_slice_if_contiguous(members) for members in groups.members]

    def adjust_logits(self, logits: Float[Tensor, "T E"], context: RouterContext) -> Float[Tensor, "T E"]:
        """Pass every group's columns through its balancer."""
        return self._join([part.adjust_logits(*self._given(logits, context, g)) for g, part in enumerate(self.parts)])

    def adjust_choice(self, scores: Float[Tensor, "T E"], context: RouterContext) -> Float[Tensor, "T E"]:
        """Pass every group's columns through its balancer."""
        return self._join([part.adjust_choice(*self._given(scores, context, g)) for g, part in enumerate(self.parts)])

    def losses(self, routing: Routing) -> dict[str, Float[Tensor, ""]]:
        """Return the losses of all groups, those of one name added."""
        total: dict[str, Tensor] = {}
        for g, part in enumerate(self.parts):
            for name, value in part.losses(self.within(routing, g)).items():
                total[name] = total[name] + value if name in total else value
        return total

    def observe(self, routing: Routing) -> None:
        """Let every balancer observe its group; where one needs the counts of the step, count those of all experts."""
        if self.needs_step_counts:
            self.accumulate(STEP_COUNTS, selected_load(routing))
        for g, part in enumerate(self.parts):
            part.observe(self.within(routing, g))

    def step(self) -> None:
        """Let every balancer step."""
        for part in self.parts:
            part.step()

    def within(self, routing: Routing, group: int) -> Routing:
        """Return the routing of one group: its columns, its experts counted from 0, the other pairs not selected."""
        logits, context = self._given(routing.logits, routing.context, group)
        columns, members = self._columns_on(logits.device, group), self.groups.members[group]
        local = routing.expert_ids - members[0]
        if not isinstance(columns, slice):
            place = {e: i for i, e in enumerate(members)}
            table = numbers_on(logits.device, [place.get(e, -1) for e in range(self.groups.num_experts)])
            local = table[routing.expert_ids]
        inside = (local >= 0) & (local < len(members))
        return replace(
            routing,
            logits=logits,
            scores=routing.scores[:, columns],
            expert_ids=local.clamp(0, len(members) - 1),
            selected=routing.selected & inside,
            kept=routing.kept & inside,
            context=context,
            step_counts=None if routing.step_counts is None else routing.step_counts[columns],
            counts=None if routing.counts is None else routing.counts[columns],
        )

    def _given(self, values: Tensor, context: RouterContext, group: int) -> tuple[Tensor, RouterContext]:
        if values.shape[-1] != self.groups.num_experts:
            raise ConfigError(
                f"per_group: the groups hold {self.groups.num_experts} experts, the router has {values.shape[-1]}"
            )
        columns, weight = self._columns_on(values.device, group), context.gate_weight
        noise, noise_std = context.noise, context.noise_std
        return values[:, columns], replace(
            context,
            noise=None if noise is None else noise[:, columns],
            noise_std=None if noise_std is None else noise_std[:, columns],
            gate_weight=None if weight is None else weight[columns],
        )

    def _columns_on(self, device: torch.device, group: int) -> slice | Tensor:
        columns = self._columns[group]
        return columns if isinstance(columns, slice) else numbers_on(device, columns)

    def _join(self, parts: list[Tensor]) -> Tensor:
        """Put the groups' columns back to their places."""
        joined, order = torch.cat(parts, dim=-1), [expert for group in self.groups.members for expert in group]
        if order == sorted(order):
            return joined
        return joined[:, numbers_on(joined.device, sorted(range(len(order)), key=order.__getitem__))]


def _slice_if_contiguous(members: tuple[int, ...]) -> slice | list[int]:
    """Return a slice, which copies nothing, where the members are neighbours in order."""
    first, end = members[0], members[0] + len(members)
    return slice(first, end) if members == tuple(range(first, end)) else list(members)
