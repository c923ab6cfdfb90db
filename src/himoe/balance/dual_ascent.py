"""Dual ascent on the two weights of Hi-MoE: our extension of the paper's Lagrangian reading (arXiv 2605.08292, 4.4).

The paper writes its terms as constraints, C_sys = B ≤ ε_inter on concentration between groups and
C_ov = 1 − A ≤ ε_intra on overlap inside them, and keeps the multipliers fixed. Here they move, once per optimizer step:

    λ ← clip(λ + η·(C − ε), 0, λ_max)

The second constraint is not convex in the probabilities, so no optimality is claimed.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from himoe.balance.base import Balancer
from himoe.errors import ConfigError
from himoe.functional.groups import Groups
from himoe.functional.masked import token_count
from himoe.types import Routing

ROUNDING = 1e-9


@runtime_checkable
class Constrained(Protocol):
    """What `DualAscent` needs of the terms it steers; `TwoLevelTerms` has it."""

    groups: Groups
    intra: str
    inter: str
    source: str
    lambda_intra: float
    lambda_inter: float

    def measures(self, routing: Routing) -> dict[str, Float[Tensor, ""]]:
        """Return the unweighted measures `intra` and `inter`."""
        ...


class DualAscent(Balancer):
    """Let the weights of two-level terms follow their constraints.

    Args:
        terms: `TwoLevelTerms` of an l2 form; its own λ are the starting values.
        epsilon_inter: bound on B. Feasible above B's minimum (1/G for `dense`) up to 1.
        epsilon_intra: bound on 1 − A. Feasible above 0 up to 1 − 1/S (`group_conditional`) or 1 − 1/E (`global`).
        rate: η.
        maximum: λ_max.

    State: `multipliers` (2,) fp32, λ_intra and λ_inter.
    """

    multipliers: Tensor

    def __init__(
        self,
        terms: Constrained,
        *,
        epsilon_inter: float,
        epsilon_intra: float,
        rate: float = 1e-3,
        maximum: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(terms, Constrained):
            raise ConfigError(f"dual_ascent: needs two-level terms, got {type(terms).__name__}")
        if rate < 0 or maximum <= 0:
            raise ConfigError(f"dual_ascent: rate = {rate} must be ≥ 0 and maximum = {maximum} above 0")
        self.terms = terms
        self.epsilon_intra, self.epsilon_inter, self.rate, self.maximum = epsilon_intra, epsilon_inter, rate, maximum
        self._check_feasible()
        self._start = (float(terms.lambda_intra), float(terms.lambda_inter))
        self.register_buffer("multipliers", torch.tensor(self._start, dtype=torch.float32))

    def _check_feasible(self) -> None:
        intra, inter, groups = self.terms.intra, self.terms.inter, self.terms.groups
        least_overlap = {
            "global": 1 - 1 / groups.num_experts,
            "group_conditional": 1 - sum(1 / s for s in groups.sizes) / groups.num_groups,
        }
        # Bounds over all probabilities; for the selected forms with one expert per group, more only raise B.
        least_inter = {"dense": 1 / groups.num_groups} | dict.fromkeys(
            ("sparse", "selected"), 1 / sum(s * s for s in groups.sizes)
        )
        if intra not in least_overlap or inter not in least_inter:
            raise ConfigError(f"dual_ascent: intra = {intra!r} with inter = {inter!r}: only the l2 forms have bounds")
        if not least_inter[inter] < self.epsilon_inter <= 1:
            raise ConfigError(
                f"dual_ascent: epsilon_inter = {self.epsilon_inter} is infeasible for {inter}: "
                f"must be above {least_inter[inter]:.6g} and at most 1"
            )
        if not 0 < self.epsilon_intra <= least_overlap[intra]:
            raise ConfigError(
                f"dual_ascent: epsilon_intra = {self.epsilon_intra} is infeasible for {intra}: "
                f"must be above 0 and at most {least_overlap[intra]:.6g}"
            )
        # Σp² ≤ Σm², and with a_g the largest p of group g, which is selected: Σp² ≤ max a ≤ √Σa², Σp² ≤ S·Σa².
        selected_most = min(self.epsilon_inter**0.5, max(groups.sizes) * self.epsilon_inter)
        most = self.epsilon_inter if inter == "dense" else selected_most
        one_source = inter == "dense" or self.terms.source == "corrected"  # selected forms look at corrected p
        if intra == "global" and one_source and 1 - self.epsilon_intra > most + ROUNDING:
            raise ConfigError(
                f"dual_ascent: epsilon_intra = {self.epsilon_intra} asks for Σp² ≥ {1 - self.epsilon_intra:.6g}, "
                f"but {inter} ≤ epsilon_inter = {self.epsilon_inter} allows at most {most:.6g}; raise one of the two"
            )

    def reset_parameters(self) -> None:
        """Return to the starting multipliers."""
        self.multipliers.copy_(torch.tensor(self._start))

    def losses(self, routing: Routing) -> dict[str, Float[Tensor, ""]]:
        """Return `intra` = −λ_intra·A and `inter` = +λ_inter·B with the multipliers in force."""
        measures, multipliers = self.terms.measures(routing), self.multipliers
        return {"intra": -multipliers[0] * measures["intra"], "inter": multipliers[1] * measures["inter"]}

    def observe(self, routing: Routing) -> None:
        """Sum both constraints' values over real tokens."""
        measures = self.terms.measures(routing)
        tokens = token_count(routing.logits, routing.context.mask).to(torch.float64)
        values = torch.stack([1 - measures["intra"], measures["inter"]]).to(torch.float64)
        self.accumulate("constraints", values * tokens)
        self.accumulate("tokens", tokens)

    def step(self) -> None:
        """Move both multipliers by η times their constraint's excess."""
        if self.sums:
            tokens = self.sums["tokens"]
            value = self.sums["constraints"] / tokens.clamp(min=1)
            excess = value - value.new_tensor([self.epsilon_intra, self.epsilon_inter])
            moved = (self.multipliers + self.rate * excess).clamp(0, self.maximum).to(self.multipliers.dtype)
            self.multipliers.copy_(torch.where(tokens > 0, moved, self.multipliers))
