"""The local entropy loss of LIMoE (arXiv 2206.02770): every token sure of its experts.

    weight·mean_t H(p_t)

Alone it does not balance, it lets few experts win; LIMoE has it beside a loss that keeps the mean probabilities even.
Between 0, all tokens sure, and weight·log E.
"""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from himoe.balance.base import Balancer
from himoe.errors import ConfigError
from himoe.functional.losses import log_probabilities
from himoe.functional.masked import masked_mean
from himoe.types import Routing


class LocalEntropy(Balancer):
    """Add `local_entropy`, the mean entropy of each token's probabilities; it does not balance.

    Args:
        weight: ≥ 0; the default is ours.
        source: whose entropy: `corrected`, the scores divided by their sum, or `raw`, softmax of the gate's logits.
    """

    loss_names: ClassVar[tuple[str, ...]] = ("local_entropy",)

    def __init__(self, *, weight: float = 1e-3, source: str = "corrected") -> None:
        super().__init__()
        if not 0 <= weight < float("inf") or source not in ("raw", "corrected"):
            raise ConfigError(
                f"local_entropy: weight = {weight} must be ≥ 0 and finite, source = {source!r} raw or corrected"
            )
        self.weight, self.source = weight, source

    def losses(self, routing: Routing) -> dict[str, Float[Tensor, ""]]:
        """Return the weighted loss of this layer."""
        log_p = log_probabilities(routing, self.source)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return {"local_entropy": self.weight * masked_mean(entropy, routing.context.mask)}
