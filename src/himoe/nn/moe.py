"""The MoE layer: router, dispatcher, experts and an optional shared expert."""

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


def moe_layers(model: nn.Module) -> list[MoE]:
    """Return the MoE layers of a model, found by type, in the order in which they were registered."""
    return [module for module in model.modules() if isinstance(module, MoE)]
