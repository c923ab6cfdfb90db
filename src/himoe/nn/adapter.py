"""An MoE layer in somebody else's block: `MoEAdapter` returns y alone, `collect_routings` receives the routings."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from himoe.errors import ConfigError
from himoe.nn.moe import MoE, moe_layers
from himoe.types import Routing


class _Collector:
    """Routings of one forward pass, in the order of `moe_layers`."""

    def __init__(self, model: nn.Module, outer: "_Collector | None") -> None:
        self.outer = outer
        self.index = {id(layer): i for i, layer in enumerate(moe_layers(model))}
        self.routings: list[Routing | None] = [None] * len(self.index)

    def add(self, layer: MoE, routing: Routing) -> None:
        i = self.index.get(id(layer))
        if i is None:  # not this model's: an enclosing collect_routings() may be waiting for it
            if self.outer is not None:
                self.outer.add(layer, routing)
            return
        if self.routings[i] is not None:
            raise ConfigError(f"MoE layer {i} ran twice inside one collect_routings(); open one for every forward pass")
        self.routings[i] = routing


_collector: ContextVar[_Collector | None] = ContextVar("himoe_collector", default=None)


@contextmanager
def collect_routings(model: nn.Module) -> Iterator[list[Routing | None]]:
    """Collect what the `MoEAdapter`s of `model` decide in one forward pass.

    Yields:
        a list in the order of `moe_layers(model)`, filled as the layers run; None for layers that did not run.

    Raises:
        ConfigError: a layer runs twice, or the model has no MoE layer.
    """
    collector = _Collector(model, _collector.get())
    if not collector.routings:
        raise ConfigError(f"collect_routings: {type(model).__name__} has no MoE layer")
    token = _collector.set(collector)
    try:
        yield collector.routings
    finally:
        _collector.reset(token)


class MoEAdapter(nn.Module):
    """Make an `MoE` return its output alone, for somebody else's block; `collect_routings` receives the routing.

    A recomputed forward (activation checkpointing) hands over nothing: its routing was handed over the first time.

    Args:
        moe: the layer.
    """

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Float[Tensor, "*batch D"], mask: Bool[Tensor, "*batch"] | None = None) -> Tensor:
        """Return y alone."""
        y, routing = self.moe(x, mask)
        collector = _collector.get()
        # Inside backward there is a running graph task: this is a recomputation.
        if collector is not None and torch._C._current_graph_task_id() == -1:
            collector.add(self.moe, routing)
        return y
