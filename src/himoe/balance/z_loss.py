"""The router z-loss of ST-MoE (arXiv 2202.08906): weight · mean logsumexp(logits)²."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from himoe.balance.base import Balancer
from himoe.errors import ConfigError
from himoe.functional.losses import z_loss
from himoe.types import Routing


class ZLoss(Balancer):
    """Add `z_loss`, which keeps the gate's logits small; it does not balance.

    Args:
        weight: 1e-3 in the paper.
    """

    loss_names: ClassVar[tuple[str, ...]] = ("z_loss",)

    def __init__(self, *, weight: float = 1e-3) -> None:
        super().__init__()
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"z_loss: weight = {weight} must be ≥ 0 and finite")
        self.weight = weight

    def losses(self, routing: Routing) -> dict[str, Float[Tensor, ""]]:
        """Return the weighted loss of this layer."""
        return {"z_loss": self.weight * z_loss(routing)}
