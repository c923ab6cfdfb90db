"""The variance loss of "Advancing Expert Specialization for Better MoE" (arXiv 2505.22323): tokens that choose apart.

    −weight·mean_i var_t p_ti

It is lowest where every expert is wanted much by some tokens and little by the others, and 0, its highest, where all
tokens want the same. It does not balance: the paper has it beside a balancing loss and one that keeps the outputs of a
token's experts orthogonal, which is not here. It is not linear in the probabilities: the mean over micro-batches is not
the value of the whole batch.

Deviation: the paper's scores are a softmax; here those of the router divided by their sum, or the softmax.
"""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from himoe.balance.base import Balancer
from himoe.errors import ConfigError
from himoe.functional.losses import probabilities
from himoe.functional.masked import masked_mean
from himoe.types import Routing


class ScoreVariance(Balancer):
    """Add `score_variance`, minus the variance over tokens of each expert's probability; it does not balance.

    Args:
        weight: ≥ 0; the default is ours.
        source: whose: `corrected`, the scores divided by their sum, or `raw`, softmax of the gate's logits.
    """

    loss_names: ClassVar[tuple[str, ...]] = ("score_variance",)

    def __init__(self, *, weight: float = 1e-3, source: str = "corrected") -> None:
        super().__init__()
        if not 0 <= weight < float("inf") or source not in ("raw", "corrected"):
            raise ConfigError(
                f"score_variance: weight = {weight} must be ≥ 0 and finite, source = {source!r} raw or corrected"
            )
        self.weight, self.source = weight, source

    def losses(self, routing: Routing) -> dict[str, Float[Tensor, ""]]:
        """Return the weighted loss of this layer; 0 without real tokens."""
        p, mask = probabilities(routing, self.source), routing.context.mask
        variance = masked_mean((p - masked_mean(p, mask)).square(), mask)
        return {"score_variance": -self.weight * variance.mean()}
