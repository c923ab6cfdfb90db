"""Dual ascent on the two weights of Hi-MoE: our extension of the paper's Lagrangian reading (arXiv 2605.08292, 4.4).

The paper writes its terms as constraints, C_sys = B ≤ ε_inter on concentration between groups and
C_ov = 1 − A ≤ ε_intra on overlap inside them, and keeps the multipliers fixed. Here they move, once per optimizer step:

    λ ← clip(λ + η·(C − ε), 0, λ_max)

The second constraint is not convex in the probabilities, so no optimality is claimed.
"""

from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from himoe.balance.base import Balancer
from himoe.errors import ConfigError
from himoe.functional.feasibility import check_feasible
from himoe.functional.groups import Groups
from himoe.functional.masked import token_count
from himoe.types import Routing


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

    loss_names: ClassVar[tuple[str, ...]] = ("intra", "inter")

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
        if not (0 <= rate < float("inf") and 0 < maximum < float("inf")):
            raise ConfigError(f"dual_ascent: rate = {rate} must be ≥ 0 and maximum = {maximum} above 0")
        self.terms = terms
        self.epsilon_intra, self.epsilon_inter, self.rate, self.maximum = epsilon_intra, epsilon_inter, rate, maximum
        check_feasible(
            terms.intra,
            terms.inter,
            terms.groups,
            epsilon_intra=epsilon_intra,
            epsilon_inter=epsilon_inter,
            one_source=terms.inter == "dense" or terms.source == "corrected",  # selected forms look at corrected p
        )
        self._start = (float(terms.lambda_intra), float(terms.lambda_inter))
        self.register_buffer("multipliers", torch.tensor(self._start, dtype=torch.float32))

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
            excess = torch.stack([value[0] - self.epsilon_intra, value[1] - self.epsilon_inter])
            moved = (self.multipliers + self.rate * excess).clamp(0, self.maximum).to(self.multipliers.dtype)
            self.multipliers.copy_(torch.where(tokens > 0, moved, self.multipliers))
