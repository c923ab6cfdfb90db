"""The MoE layer: router, dispatcher, experts, an optional shared expert; `MoEAdapter` fits it into others' blocks."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from himoe.errors import ConfigError
from himoe.nn.dispatch import Dropless
from himoe.nn.router import Router
from himoe.types import Routing


class MoE(nn.Module):
    """A sparse Mixture-of-Experts layer; returns its output and its `Routing`, always both.

    Args:
        router: decides who goes where; `himoe.presets` has one for every paper.
        experts: grouped expert weights, such as `SwiGLUExperts`.
        dispatcher: `Dropless` by default.
        shared_expert: a network that sees every token and is added to the routed output.

    >>> import torch
    >>> from himoe import MoE, SwiGLUExperts, presets
    >>> router = presets.hi_moe(dim=16, num_experts=8, num_groups=4, top_k=4)
    >>> y, routing = MoE(router, SwiGLUExperts(8, 16, 32))(torch.randn(2, 5, 16))
    >>> y.shape, routing.expert_ids.shape
    (torch.Size([2, 5, 16]), torch.Size([10, 4]))
    """

    def __init__(
        self,
        router: Router,
        experts: nn.Module,
        *,
        dispatcher: nn.Module | None = None,
        shared_expert: nn.Module | None = None,
    ) -> None:
        super().__init__()
        num_experts = getattr(experts, "num_experts", router.num_experts)
        if num_experts != router.num_experts:
            raise ConfigError(f"the router has num_experts = {router.num_experts}, the experts are {num_experts}")
        self.router, self.experts = router, experts
        self.dispatcher = Dropless() if dispatcher is None else dispatcher
        self.shared_expert = shared_expert

    def forward(
        self,
        x: Float[Tensor, "*batch D"],
        mask: Bool[Tensor, "*batch"] | None = None,
        *,
        token_ids: Int[Tensor, "*batch"] | None = None,
    ) -> tuple[Float[Tensor, "*batch D"], Routing]:
        """Route, compute and combine.

        Args:
            x: (…, D).
            mask: x's leading shape, True for real tokens; padding is routed nowhere and counts for nothing.
            token_ids: x's leading shape, for selectors that look at them.

        Returns:
            y of x's shape and dtype (under autocast, of the autocast dtype), and the layer's routing.
        """
        batch_shape = x.shape[:-1]
        for name, value in (("mask", mask), ("token_ids", token_ids)):
            if value is not None and value.shape != batch_shape:
                raise ConfigError(f"MoE: {name} has shape {tuple(value.shape)}, x needs {tuple(batch_shape)}")
        if mask is not None and mask.dtype != torch.bool:
            raise ConfigError(f"MoE: mask is {mask.dtype}, must be torch.bool, True for real tokens: pass mask.bool()")
        flat = x.reshape(-1, x.shape[-1])
        routing = self.router(
            flat,
            None if mask is None else mask.reshape(-1),
            batch_shape=tuple(batch_shape),
            token_ids=None if token_ids is None else token_ids.reshape(-1),
        )
        y, routing = self.dispatcher(flat, routing, self.experts)
        if self.shared_expert is not None:
            y = y + self.shared_expert(flat)
        return y.view_as(x), routing


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


def moe_layers(model: nn.Module) -> list[MoE]:
    """Return the MoE layers of a model, found by type, in the order in which they were registered."""
    return [module for module in model.modules() if isinstance(module, MoE)]
