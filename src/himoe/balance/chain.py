"""`Chain`: several balancers as one, each hook called in order."""

from collections.abc import Sequence
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from himoe.balance.base import Balancer
from himoe.types import RouterContext, Routing


class Chain(Balancer):
    """Apply balancers one after another; losses of the same name are added.

    Args:
        *balancers: in the order in which they change logits and scores.

    >>> from himoe.balance import Switch, ZLoss
    >>> len(Chain(Switch(weight=0.01), ZLoss(weight=0.001)).parts)
    2
    """

    passes_on = True
    parts: Sequence[Balancer]

    def __init__(self, *balancers: Balancer) -> None:
        super().__init__()
        self.parts = cast("Sequence[Balancer]", nn.ModuleList(balancers))

    def adjust_logits(self, logits: Float[Tensor, "T E"], context: RouterContext) -> Float[Tensor, "T E"]:
        """Pass the logits through every part."""
        for part in self.parts:
            logits = part.adjust_logits(logits, context)
        return logits

    def adjust_choice(self, scores: Float[Tensor, "T E"], context: RouterContext) -> Float[Tensor, "T E"]:
        """Pass the scores through every part."""
        for part in self.parts:
            scores = part.adjust_choice(scores, context)
        return scores

    def adds_to_choice(self) -> list[Float[Tensor, " E"]] | None:
        """Return what the parts add, if that is all they do."""
        total: list[Tensor] = []
        for part in self.parts:
            if (added := part.adds_to_choice()) is None:
                return None
            total += added
        return total

    def losses(self, routing: Routing) -> dict[str, Float[Tensor, ""]]:
        """Return the losses of all parts."""
        total: dict[str, Tensor] = {}
        for part in self.parts:
            for name, value in part.losses(routing).items():
                total[name] = total[name] + value if name in total else value
        return total

    def observe(self, routing: Routing) -> None:
        """Let every part observe."""
        for part in self.parts:
            part.observe(routing)

    def step(self) -> None:
        """Let every part step."""
        for part in self.parts:
            part.step()
