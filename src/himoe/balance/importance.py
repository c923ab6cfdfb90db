"""The importance loss of the sparsely-gated layer (Shazeer et al., arXiv 1701.06538, equations 6 and 7).

    importance_i = Σ_t of the combine weights that the tokens give to expert i        weight·CV(importance)²

0 at perfect balance, for every K and score function; E/K − 1 times the weight when the same K experts share everything
evenly. It evens out the weights, not the pairs: an expert may have few tokens with large weights. With one expert per
token and weights divided by their sum every weight is 1, and the loss has no gradient: use K ≥ 2, as the paper does.
The paper's gates are a softmax over the selected logits; here they are the router's own weights, whatever its score.
It is not linear in the weights: the mean over micro-batches is not the value of one undivided batch.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from himoe.balance.base import Balancer
from himoe.errors import ConfigError
from himoe.functional.gate_losses import importance, squared_variation
from himoe.types import Routing


class Importance(Balancer):
    """Add `importance` = weight·CV² of summed combine weights.

    Args:
        weight: 0.1 in the paper.
    """

    balances_load: ClassVar[bool] = True
    toy_options: ClassVar[Mapping[str, Any]] = {"weight": 1.0}
    loss_names: ClassVar[tuple[str, ...]] = ("importance",)

    def __init__(self, *, weight: float = 0.1) -> None:
        super().__init__()
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"importance: weight = {weight} must be ≥ 0 and finite")
        self.weight = weight

    def losses(self, routing: Routing) -> dict[str, Float[Tensor, ""]]:
        """Return the weighted loss of this layer."""
        return {"importance": self.weight * squared_variation(importance(routing))}
