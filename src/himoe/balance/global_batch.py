"""The load-balancing loss over the global batch (Qwen, arXiv 2501.11873).

    α·E·Σ_i f_i P_i        as `switch`, but f from the counts of all ranks and of the micro-batches of the step so far

P, which has the gradient, is of this rank's micro-batch. So a micro-batch may be uneven, a domain may keep its experts,
as long as the step as a whole is even. f sums to 1, and at perfect balance of the global batch the value is exactly α
for every K and score function. Over ranks of equally many tokens the mean of the losses is that of one rank with all
the tokens. Over micro-batches it is not linear: early ones cannot count later ones.

`himoe.aux_losses` fills in the counts, by one all-reduce for all layers; by itself the balancer knows this rank's.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from himoe.balance.base import STEP_COUNTS, Balancer
from himoe.errors import ConfigError
from himoe.functional.losses import load_balance
from himoe.functional.stats import selected_load
from himoe.types import Routing


class GlobalBatch(Balancer):
    """Add `global_balance`, `switch` over ranks and micro-batches.

    Args:
        weight: α, in the convention of `switch`.
        source: what P averages: `corrected`, the scores divided by their sum, or `raw`, softmax of the gate's logits.
    """

    balances_load: ClassVar[bool] = True
    toy_options: ClassVar[Mapping[str, Any]] = {"weight": 0.3}
    loss_names: ClassVar[tuple[str, ...]] = ("global_balance",)
    needs_step_counts: bool = True

    def __init__(self, *, weight: float = 0.01, source: str = "corrected") -> None:
        super().__init__()
        if not 0 <= weight < float("inf") or source not in ("raw", "corrected"):
            raise ConfigError(
                f"global_batch: weight = {weight} must be ≥ 0 and finite, source = {source!r} raw or corrected"
            )
        self.weight, self.source = weight, source
        self.alpha = weight

    def losses(self, routing: Routing) -> dict[str, Float[Tensor, ""]]:
        """Return the weighted loss of this layer."""
        counts = routing.step_counts
        if counts is None:
            counts = selected_load(routing)
            if routing.context.training and STEP_COUNTS in self.sums:
                counts = counts + self.sums[STEP_COUNTS]
        return {"global_balance": self.weight * load_balance(routing, self.source, counts)}

    def observe(self, routing: Routing) -> None:
        """Count the selected pairs."""
        self.accumulate(STEP_COUNTS, selected_load(routing))
