"""The load-balancing loss within each sequence, as DeepSeek-V2 and V3 add it (arXiv 2412.19437).

Like `Switch`, with f and P of one sequence, and the mean over sequences: it keeps a single text from overloading a few
experts, which balance over the batch allows. At perfect balance in every sequence the value is exactly the weight.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from himoe.balance.base import Balancer
from himoe.errors import ConfigError
from himoe.functional.losses import sequence_load_balance
from himoe.types import Routing


class SequenceBalance(Balancer):
    """Add `sequence_balance`, weight times the mean over sequences of E·Σ_i f_i P_i.

    Args:
        weight: 1e-4 in DeepSeek-V3.
        source: what P averages: `corrected`, the scores divided by their sum, or `raw`, softmax of the gate's logits.
    """

    balances_load: ClassVar[bool] = True
    toy_options: ClassVar[Mapping[str, Any]] = {"weight": 0.3}
    loss_names: ClassVar[tuple[str, ...]] = ("sequence_balance",)

    def __init__(self, *, weight: float = 1e-4, source: str = "corrected") -> None:
        super().__init__()
        if not 0 <= weight < float("inf") or source not in ("raw", "corrected"):
            raise ConfigError(
                f"sequence: weight = {weight} must be ≥ 0 and finite, source = {source!r} raw or corrected"
            )
        self.weight, self.source = weight, source
        self.alpha = weight

    def losses(self, routing: Routing) -> dict[str, Float[Tensor, ""]]:
        """Return the weighted loss of this layer."""
        return {"sequence_balance": self.weight * sequence_load_balance(routing, self.source)}
