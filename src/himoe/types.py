"""What one MoE layer is told and what it decided: `RouterContext` and `Routing`.

Both are plain records and pytrees, so they pass through torch.compile, checkpointing and tree_map.
Shape letters everywhere: T tokens · D width · F expert hidden · E experts · K experts per token · G groups.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class RouterContext:
    """What hooks and selectors may need beside the logits.

    Attributes:
        mask: (T,) True for real tokens, False for padding; None when every token is real.
        batch_shape: the leading shape of the layer's input, usually (B, S); its product is T.
        token_ids: (T,) vocabulary ids, where the model passes them on.
        gate_weight: (E, D) the gate's matrix, None for a gate that has none.
        noise: (T, E) what a noisy gate adds to the logits before they are adjusted; None in eval and for other gates.
        noise_std: (T, E) the standard deviation that `noise` was drawn with.
        training: the layer's mode at this call.
    """

    mask: Bool[Tensor, " T"] | None = None
    batch_shape: tuple[int, ...] = ()
    token_ids: Int[Tensor, " T"] | None = None
    gate_weight: Float[Tensor, "E D"] | None = None
    noise: Float[Tensor, "T E"] | None = None
    noise_std: Float[Tensor, "T E"] | None = None
    training: bool = False


@dataclass(frozen=True)
class Routing:
    """What a router decided for one layer and one batch.

    Attributes:
        logits: (T, E) the gate's output, untouched, at least fp32.
        scores: (T, E) score(adjusted logits): what the combine weights are made of.
        expert_ids: (T, K) chosen experts, each in 0 … E-1; K is the largest number per token, unused places are not
            `selected` but still hold some id.
        weights: (T, K) combine weights, as the router made them (multiply by `kept` to see what counts).
        selected: (T, K) chosen by the selector; False on padding and unused places. Losses and controllers use these.
        kept: (T, K) selected and not dropped by a capacity limit. These pairs are computed.
        context: what the router was told.
        step_counts: (E,) int64 selected pairs of this layer over all ranks and the micro-batches of the optimizer step
            so far, this one included; `aux_losses` fills it in for the balancers that ask for it.
        counts: (E,) int64 selected pairs of this call, where the router counted them while it chose; else None.
    """

    logits: Float[Tensor, "T E"]
    scores: Float[Tensor, "T E"]
    expert_ids: Int[Tensor, "T K"]
    weights: Float[Tensor, "T K"]
    selected: Bool[Tensor, "T K"]
    kept: Bool[Tensor, "T K"]
    context: RouterContext
    step_counts: Int[Tensor, " E"] | None = None
    counts: Int[Tensor, " E"] | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.logits.shape[-1]

    @property
    def top_k(self) -> int:
        """K, the largest number of experts a token may have."""
        return self.expert_ids.shape[-1]

    def replace(self, **changes: Tensor) -> "Routing":
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def _register(record: type, constants: tuple[str, ...] = ()) -> None:
    """Make a record a pytree whose leaves are its tensors; the constants travel in the tree's structure."""
    names = [f.name for f in dataclasses.fields(record) if f.name not in constants]

    def flatten(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(value, n) for n in names], tuple(getattr(value, n) for n in constants)

    def unflatten(leaves: Iterable[Any], context: tuple[Any, ...]) -> Any:
        return record(**dict(zip(names, leaves, strict=True)), **dict(zip(constants, context, strict=True)))

    pytree.register_pytree_node(record, flatten, unflatten, serialized_type_name=f"himoe.{record.__name__}")


_register(RouterContext, constants=("batch_shape", "training"))
_register(Routing)
