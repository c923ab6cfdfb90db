"""The global entropy loss of LIMoE (arXiv 2206.02770): the batch as a whole spread over at least S experts.

    weight·max(0, log S − H(p̄))        p̄_i = mean_t p_ti

Below S experts' worth of entropy it pulls the mean probabilities apart, above it is silent. With S = E, the default,
it is weight·KL(p̄ ‖ uniform): 0 where the means are even, weight·log E where one expert has everything. It evens
probabilities, not counts. It is not linear in them: the mean over micro-batches is not the value of the whole batch.

Deviation: the paper has one such term for each modality; here all real tokens of a layer are one.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from himoe.balance.base import Balancer
from himoe.errors import ConfigError
from himoe.functional.losses import probabilities
from himoe.functional.masked import masked_mean
from himoe.types import Routing


class GlobalEntropy(Balancer):
    """Add `global_entropy`, what the entropy of the mean probabilities lacks of that of S even experts.

    Args:
        weight: ≥ 0; the default is ours.
        experts: S ≥ 1, not necessarily whole; None for all.
        source: whose: `corrected`, the scores divided by their sum, or `raw`, softmax of the gate's logits.
    """

    balances_load: ClassVar[bool] = True
    toy_options: ClassVar[Mapping[str, Any]] = {"weight": 1.0}
    loss_names: ClassVar[tuple[str, ...]] = ("global_entropy",)

    def __init__(self, *, weight: float = 1e-2, experts: float | None = None, source: str = "corrected") -> None:
        super().__init__()
        possible = experts is None or 1 <= experts < math.inf
        if not 0 <= weight < math.inf or source not in ("raw", "corrected") or not possible:
            raise ConfigError(
                f"global_entropy: weight = {weight} must be ≥ 0 and finite, experts = {experts} ≥ 1 or none, "
                f"source = {source!r} raw or corrected"
            )
        self.weight, self.experts, self.source = weight, experts, source

    def losses(self, routing: Routing) -> dict[str, Float[Tensor, ""]]:
        """Return the weighted loss of this layer; 0 without real tokens."""
        mean = masked_mean(probabilities(routing, self.source), routing.context.mask)
        entropy = torch.special.entr(mean.clamp(min=torch.finfo(mean.dtype).tiny)).sum()  # its slope at 0 is infinite
        lack = (math.log(self.experts or mean.numel()) - entropy).clamp(min=0) * (mean.sum() > 0)
        return {"global_entropy": self.weight * lack}
