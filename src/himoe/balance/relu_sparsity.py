"""The sparsity controller of ReMoE (arXiv 2412.14711): an L1 loss on ReLU scores whose weight follows their density.

With R the scores of a ReLU router, whose experts are those with R > 0 (selector `threshold`), over T real tokens:

    loss = λ·mean_t Σ_e f_e·R_te        f_e = (E/(K·T))·#{t : R_te > 0}        S = 1 − #{R > 0}/(T·E)
    λ ← λ·α^sign(1 − K/E − S), once per optimizer step        f_e = 1 for `balance = False`

Denser than wanted (S below 1 − K/E, more than K experts a token) makes λ grow, sparser makes it shrink. f_e presses
popular experts harder: on a toy with learned experts the refined loss left about half the MaxVio of the plain one. It
does not claim to balance by itself, since nothing in it revives an expert whose scores are all 0. Like `switch` it is
not linear in the counts: f is that of a micro-batch. S counts all micro-batches and ranks of the step.

λ is an integrator: where scores follow the loss more slowly than α per step moves it, density overshoots K. The paper's
α = 1.2 is for runs of many thousand steps; short ones want it nearer 1.

The paper averages the loss and S over all layers, with one λ. Here each layer has its own λ and density, unless one
instance is given to several layers: then it has one λ and their mean S. Losses are summed over layers, so that λ takes
the place of the paper's λ/L; the controller finds its size by itself.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from himoe.balance.base import Balancer
from himoe.errors import ConfigError
from himoe.functional.masked import masked_mean, masked_sum, token_count
from himoe.types import Routing


class ReluSparsity(Balancer):
    """Add `relu_sparsity`, an L1 loss whose weight λ leads ReLU scores to K active experts on average.

    Args:
        num_experts: E.
        top_k: K, the mean number of active experts to reach.
        start: λ before the first step.
        factor: α > 1, by which λ grows or shrinks in an optimizer step.
        balance: weigh each expert by its load f_e; False leaves the plain L1 norm.
        minimum: least λ, above 0.
        maximum: largest λ; reached where the scores cannot become sparse, such as those of softmax.

    State: `multiplier` () fp32, λ.
    """

    loss_names: ClassVar[tuple[str, ...]] = ("relu_sparsity",)
    toy_options: ClassVar[Mapping[str, Any]] = {"start": 1e-2, "factor": 1.02}

    multiplier: Tensor

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        *,
        start: float = 1e-8,
        factor: float = 1.2,
        balance: bool = True,
        minimum: float = 1e-10,
        maximum: float = 100.0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ConfigError(f"relu_sparsity: top_k = {top_k} must be between 1 and num_experts = {num_experts}")
        if not 0 < minimum <= start <= maximum < float("inf") or not 1 < factor < float("inf"):
            raise ConfigError(
                f"relu_sparsity: factor = {factor} must be above 1 and finite, and 0 < minimum = {minimum} ≤ "
                f"start = {start} ≤ maximum = {maximum}, finite"
            )
        self.top_k, self.start, self.factor, self.balance = top_k, start, factor, balance
        self.minimum, self.maximum = minimum, maximum
        self.register_buffer("multiplier", torch.tensor(start, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Start from λ = `start`."""
        self.multiplier.fill_(self.start)

    def losses(self, routing: Routing) -> dict[str, Float[Tensor, ""]]:
        """Return λ·mean_t Σ_e f_e R_te."""
        scores, mask = routing.scores, routing.context.mask
        norms = masked_mean(scores, mask)
        if self.balance:
            active = masked_sum((scores > 0).to(torch.int64), mask).to(scores.dtype)
            share = active / (self.top_k * token_count(scores, mask)).clamp(min=1)
            norms = scores.shape[-1] * share * norms
        return {"relu_sparsity": self.multiplier * norms.sum()}

    def observe(self, routing: Routing) -> None:
        """Count active pairs beyond K for each real token."""
        mask = routing.context.mask
        active = (routing.scores > 0).sum(-1)
        self.accumulate("excess", masked_sum(active - self.top_k, mask))

    def step(self) -> None:
        """Move λ by the factor, up where the scores were too dense."""
        if self.sums:
            sign = self.sums["excess"].sign()  # of 1 − K/E − S, from integers: the wanted density moves nothing
            moved = self.multiplier.to(torch.float64) * self.factor ** sign.to(torch.float64)
            self.multiplier.copy_(moved.clamp(self.minimum, self.maximum))
