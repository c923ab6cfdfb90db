"""The load-balancing loss of Switch Transformers (arXiv 2101.03961), generalised to K experts per token.

    α·E·Σ_i f_i P_i        f sums to 1 here, so the value at perfect balance is exactly α for every K

Others let f sum to K (OLMoE, the Hi-MoE authors): α here = K · α there. The value is a surrogate: it can dip slightly
under α when counts and probabilities disagree. It is not linear in the counts, so the mean over micro-batches is not
the value of one undivided batch.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from himoe.balance.base import Balancer
from himoe.errors import ConfigError
from himoe.functional.losses import load_balance
from himoe.types import Routing


class Switch(Balancer):
    """Add `load_balance` = weight·E·Σ_i f_i P_i.

    Args:
        weight: α, in the convention above.
        source: what P averages: `corrected`, the scores divided by their sum, or `raw`, softmax of the gate's logits.
    """

    balances_load: ClassVar[bool] = True
    toy_options: ClassVar[Mapping[str, Any]] = {"weight": 0.3}
    loss_names: ClassVar[tuple[str, ...]] = ("load_balance",)

    def __init__(self, *, weight: float = 0.01, source: str = "corrected") -> None:
        super().__init__()
        if not 0 <= weight < float("inf") or source not in ("raw", "corrected"):
            raise ConfigError(f"switch: weight = {weight} must be ≥ 0 and finite, source = {source!r} raw or corrected")
        self.weight, self.source = weight, source
        self.alpha = weight

    def losses(self, routing: Routing) -> dict[str, Float[Tensor, ""]]:
        """Return the weighted loss of this layer."""
        return {"load_balance": self.weight * load_balance(routing, self.source)}
