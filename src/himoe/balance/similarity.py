"""Keep the gate's rows apart, as an orthogonal router does (SimBal, arXiv 2506.14038).

    weight·‖Ŵ Ŵᵀ − I‖        Ŵ the rows of the gate's matrix, divided by their lengths

`frobenius` is the sum of the squared entries, `l1` the sum of their absolute values. 0 when the rows are orthogonal,
for every K and score function, which is possible only where E ≤ D: with more experts than dimensions the least value
of `frobenius` is E²/D − E, at rows that form a tight frame. We divide by the lengths so that the loss cannot be lowered
by the size of the gate. It looks at no token: similar tokens keep similar experts, and nothing makes the loads equal.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from himoe.balance.base import Balancer
from himoe.errors import ConfigError
from himoe.functional.gate_losses import NORMS, similarity
from himoe.types import Routing


class Similarity(Balancer):
    """Add `router_similarity`, which keeps the gate's rows apart.

    By itself it does not balance.

    Args:
        weight: the default is ours.
        norm: `frobenius`, squared, or `l1`, see above.
    """

    loss_names: ClassVar[tuple[str, ...]] = ("router_similarity",)
    toy_options: ClassVar[Mapping[str, Any]] = {"weight": 0.1}

    def __init__(self, *, weight: float = 0.01, norm: str = "frobenius") -> None:
        super().__init__()
        if not 0 <= weight < float("inf") or norm not in NORMS:
            raise ConfigError(
                f"similarity: weight = {weight} must be ≥ 0 and finite, norm = {norm!r} {' or '.join(NORMS)}"
            )
        self.weight, self.norm = weight, norm

    def losses(self, routing: Routing) -> dict[str, Float[Tensor, ""]]:
        """Return the weighted loss of this layer; raises `ConfigError` where the gate has no matrix."""
        gate_weight = routing.context.gate_weight
        if gate_weight is None:
            raise ConfigError('similarity: the gate has no (E, D) weight to compare rows of: set moe.gate = "linear"')
        return {"router_similarity": self.weight * similarity(gate_weight, self.norm)}
