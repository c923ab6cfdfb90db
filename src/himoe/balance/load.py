"""The load loss of noisy top-K gating (Shazeer et al., arXiv 1701.06538, appendix A).

    load_i = Σ_t Φ((logit_ti − threshold_ti)/noise_std_ti)        weight·CV(load)²

The threshold is the K-th largest noisy logit among the other experts, so Φ is the chance that expert i is picked when
its own noise is drawn anew: a load that the gate and its noise can be trained on, where counts have no gradient. 0 at
perfect balance, for every K and score function. Exact for a selector that takes the top K of the noisy logits; where a
balancer moves the choice, or groups limit it, the formula still looks at the noisy logits alone. K is each token's own
number of experts.

It is not linear in the load: the mean over micro-batches is not the value of one undivided batch.

It balances the choice of training alone. There is no noise in eval mode, hence no loss, and the choice is less even
there: the loss falls when the noise grows as it does when the logits draw near one another.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from himoe.balance.base import Balancer
from himoe.errors import ConfigError
from himoe.functional.gate_losses import smooth_load, squared_variation
from himoe.types import Routing


class Load(Balancer):
    """Add `smooth_load` = weight·CV² of a noisy gate's load, which evens out the choice of training.

    Args:
        weight: 0.1 in the paper.
    """

    balances_load: ClassVar[bool] = True
    toy_options: ClassVar[Mapping[str, Any]] = {"weight": 0.1}
    loss_names: ClassVar[tuple[str, ...]] = ("smooth_load",)
    needs_noise: ClassVar[bool] = True

    def __init__(self, *, weight: float = 0.1) -> None:
        super().__init__()
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"load: weight = {weight} must be ≥ 0 and finite")
        self.weight = weight

    def losses(self, routing: Routing) -> dict[str, Float[Tensor, ""]]:
        """Return the weighted loss of this layer, none in eval mode; raises `ConfigError` if the gate adds no noise."""
        context = routing.context
        if not context.training:
            return {}
        if context.noise is None or context.noise_std is None:
            raise ConfigError(
                'load: the gate adds no noise, so that no load can be expected of it: set moe.gate = "noisy"'
            )
        return {"smooth_load": self.weight * squared_variation(smooth_load(routing, context.noise, context.noise_std))}
