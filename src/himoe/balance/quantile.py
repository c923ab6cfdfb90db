"""Quantile Balancing (Jianlin Su, kexue.fm 11619; Kimi K3 technical report, section 2.3.3): a bias without a rate.

Choosing the K best of s + b with equal loads is an assignment problem. Its two families of prices are found in turn:

    cutoff_t = (K+1)-th largest of s_t + b        what a token would pay for one expert more, with the b in force
    b_e ← K/E quantile over tokens of (cutoff − s_e)        then exactly a share K/E of the tokens exceeds its cutoff

once per optimizer step, over all its micro-batches and ranks, and re-centred. Here the difference
d = cutoff − (s + b) goes into a histogram per expert (`functional/histogram.py`) and b moves by the quantile of d:
the same value, in bins that become finer as loads become equal, where uniform bins fail for many experts.

We rank by log s + b (`space = "log"`): for softmax scores that is logit + b, token by token, and it knows no scale. The
selector gets s·exp(b), which has the same order and stays positive. `linear` ranks by s + b, as published for sigmoid
scores. Either way only the order is meant: it suits selectors that take the K best; thresholds mean other values.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from himoe.balance.base import Balancer
from himoe.errors import ConfigError
from himoe.functional.groups import Groups
from himoe.functional.histogram import histogram, quantile
from himoe.types import RouterContext, Routing


class Quantile(Balancer):
    """Balance by a selection bias that is set to a quantile, once per step and without a rate.

    Args:
        num_experts: E.
        top_k: K in total, or k' of each group. K = E leaves the bias at 0.
        selection_groups: equal contiguous groups that each give k' = K/G experts: the cutoff is then within the group,
            the quantile k'/S. For unequal groups use one balancer per group (`per_group = true`, `PerGroup`).
        space: `log` ranks by log s + b, `linear` by s + b; see above.
        smoothing: share of the old bias that stays in each step, in [0, 1).

    State: `bias` (E,) fp32, in the unit of what is ranked.
    """

    balances_load: ClassVar[bool] = True
    bias: Tensor

    def __init__(
        self,
        num_experts: int,
        top_k: int | Sequence[int],
        *,
        selection_groups: Groups | int | None = None,
        space: str = "log",
        smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        groups = Groups.of(1 if selection_groups is None else selection_groups, num_experts)
        per_group = {top_k / groups.num_groups} if isinstance(top_k, int) else set(top_k)
        chosen, self.num_groups, self.size = int(min(per_group)), groups.num_groups, groups.sizes[0]
        if not groups.is_equal or per_group != {chosen} or not 1 <= chosen <= self.size:
            raise ConfigError(
                f"quantile: top_k = {top_k} from groups of {groups.sizes}: needs equal contiguous groups that give "
                "equally many experts, at least one and at most all; for others set per_group = true"
            )
        if space not in ("log", "linear") or not 0 <= smoothing < 1:
            raise ConfigError(f"quantile: space = {space!r} must be log or linear, smoothing = {smoothing} in [0, 1)")
        self.chosen, self.space, self.smoothing, self.bias_multiplies = chosen, space, smoothing, space == "log"
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Start from a bias of 0."""
        self.bias.zero_()

    def adjust_choice(self, scores: Float[Tensor, "T E"], context: RouterContext) -> Float[Tensor, "T E"]:  # noqa: ARG002
        """Return s·exp(b), which ranks as log s + b does and stays positive, or s + b."""
        return scores * self.bias.exp() if self.space == "log" else scores + self.bias

    def observe(self, routing: Routing) -> None:
        """Count how far every expert is below the cutoff of each real token."""
        if self.chosen < self.size:  # else every expert is chosen always, whatever the bias
            ranked = routing.scores
            if self.space == "log":
                ranked = ranked.clamp(min=torch.finfo(ranked.dtype).tiny).log()
            choice = (ranked + self.bias).unflatten(-1, (self.num_groups, self.size))
            cutoff = choice.topk(self.chosen + 1, dim=-1).values[..., -1:]
            self.accumulate("distances", histogram((cutoff - choice).flatten(-2), routing.context.mask))

    def step(self) -> None:
        """Move the bias by the quantiles, their mean within each group taken off."""
        if self.sums:
            move = quantile(self.sums["distances"], self.chosen, self.size).unflatten(-1, (self.num_groups, self.size))
            move = (move - move.mean(-1, keepdim=True)).flatten()
            self.bias.add_(((1 - self.smoothing) * move).to(self.bias.dtype))
