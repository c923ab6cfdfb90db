"""Dispatchers bring tokens to experts and back: `(x, routing, experts) → (y, routing with what was kept)`."""

from typing import Protocol

from jaxtyping import Float
from torch import Tensor, nn

from himoe.errors import ConfigError
from himoe.functional.dispatch import ORDERS, capacity, place_in_expert
from himoe.nn.saved_routing import saved_routing
from himoe.types import Routing


class Experts(Protocol):
    """What a dispatcher calls: (x, expert_ids, weights, kept) → Σ_k weight·expert(x)."""

    def __call__(self, x: Tensor, expert_ids: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
        """Run the kept pairs."""
        ...


class Dropless(nn.Module):
    """Compute every selected pair. A token's output does not depend on what else is in the batch."""

    def forward(
        self, x: Float[Tensor, "T D"], routing: Routing, experts: Experts
    ) -> tuple[Float[Tensor, "T D"], Routing]:
        """Run the experts on all selected pairs."""
        return experts(x, routing.expert_ids, routing.weights, routing.kept), routing


class Capacity(nn.Module):
    """Give every expert a limited number of places in training and drop the pairs that find none.

    places = floor(K·factor·T/E), T the real tokens, rounded up to `multiple`, at least 1. K is the largest number of
    experts a token may have, also where a token may have fewer: counting what later tokens chose would let them move an
    earlier one's places. Weights are not renormalised after a drop. In eval mode nothing is dropped, unless asked for:
    what a token gets must not depend on how many others are read with it, or a text read in parts, as in generation,
    would not be the text read at once. Equal weights go token by token, padding takes no place.

    Args:
        factor: 1 is the fair share; drops vanish as it grows.
        order: who comes first. `token_major`, token by token, keeps a causal router causal. The others do not:
            `column_major`, every token's first choice before any second (GShard, the Hi-MoE authors), where an expert
            can stand in several columns; `score`, the pairs of largest weight; `batch_prioritised`, the tokens of
            largest weight, column by column (V-MoE, arXiv 2106.05974, whose weights are not renormalised).
        multiple: round the places up to a multiple; the Hi-MoE authors round to even numbers.
        drop_in_eval: drop in eval mode too, as the Hi-MoE authors do.
    """

    causal_reason = "later tokens can take the places of earlier ones; order = token_major is causal"

    def __init__(
        self, factor: float, *, order: str = "token_major", multiple: int = 1, drop_in_eval: bool = False
    ) -> None:
        super().__init__()
        if not factor > 0 or multiple < 1:
            raise ConfigError(f"capacity: factor = {factor} must be above 0 and multiple = {multiple} at least 1")
        if order not in ORDERS:
            raise ConfigError(f"capacity: order = {order!r} must be {' or '.join(ORDERS)}")
        self.factor, self.order, self.multiple, self.drop_in_eval = factor, order, multiple, drop_in_eval
        self.causal = ORDERS[order].causal

    def forward(
        self, x: Float[Tensor, "T D"], routing: Routing, experts: Experts
    ) -> tuple[Float[Tensor, "T D"], Routing]:
        """Run the experts on the pairs that found a place; the returned routing's `kept` says which."""
        if not (routing.context.training or self.drop_in_eval):
            return experts(x, routing.expert_ids, routing.weights, routing.kept), routing
        mask = routing.context.mask
        tokens = routing.expert_ids.new_full((), x.shape[0]) if mask is None else mask.sum()
        places = capacity(tokens, routing.num_experts, routing.top_k, self.factor, self.multiple)
        place = place_in_expert(
            routing.expert_ids, routing.selected, routing.weights.detach(), routing.num_experts, self.order
        )
        kept = routing.selected & (place < places)
        _, kept = saved_routing(routing.expert_ids, kept)  # weights computed again may order near ties otherwise
        return experts(x, routing.expert_ids, routing.weights, kept), routing.replace(kept=kept)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"factor={self.factor}, order={self.order!r}, multiple={self.multiple}, drop_in_eval={self.drop_in_eval}"
