"""The three calls that a training loop makes, ours or anybody's.

```python
loss = task_loss + sum(aux_losses(model, routings).values())
loss.backward()
observe(model, routings)  # every micro-batch
optimizer.step()
step(model)  # every optimizer step
```
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from himoe.balance import step_balancers
from himoe.errors import ConfigError
from himoe.nn.moe import MoE, moe_layers
from himoe.types import Routing

Routings = Sequence[Routing | None]


def _pairs(model: nn.Module, routings: Routings) -> Iterable[tuple[MoE, Routing]]:
    layers = moe_layers(model)
    if len(layers) != len(routings):
        raise ConfigError(f"{len(routings)} routings for {len(layers)} MoE layers: pass one per layer, in layer order")
    for i, (layer, routing) in enumerate(zip(layers, routings, strict=True)):
        if routing is None:  # a layer that did not run
            continue
        if routing.num_experts != layer.router.num_experts:
            raise ConfigError(
                f"routing {i} has {routing.num_experts} experts, MoE layer {i} has {layer.router.num_experts}: "
                "pass the routings in layer order"
            )
        yield layer, routing


def aux_losses(model: nn.Module, routings: Routings) -> dict[str, Float[Tensor, ""]]:
    """Return the named auxiliary losses, each layer's computed by itself, then summed over layers.

    Args:
        model: holds the MoE layers.
        routings: one per layer in the order of `moe_layers(model)`; None for a layer that did not run.

    Raises:
        ConfigError: routings that do not belong to the layers, or that carry no gradient though the gate is trained
            (reentrant activation checkpointing does that: use `use_reentrant=False`).
    """
    total: dict[str, Tensor] = {}
    for i, (layer, routing) in enumerate(_pairs(model, routings)):
        trained = any(p.requires_grad for p in layer.router.gate.parameters())
        if trained and routing.context.training and torch.is_grad_enabled() and not routing.logits.requires_grad:
            raise ConfigError(
                f"aux_losses: the logits of MoE layer {i} carry no gradient, so its losses would train nothing; "
                "with activation checkpointing pass use_reentrant=False"
            )
        for name, value in layer.router.balancer.losses(routing).items():
            total[name] = total[name] + value if name in total else value
    return total


@torch.no_grad()
def observe(model: nn.Module, routings: Routings) -> None:
    """Let every balancer see one micro-batch, after its backward. Routings of eval mode are ignored."""
    for layer, routing in _pairs(model, routings):
        if routing.context.training:
            layer.router.balancer.observe(routing)


def step(model: nn.Module) -> None:
    """Move every balancer's state, once per optimizer step: one all-reduce for the whole model."""
    step_balancers(layer.router.balancer for layer in moe_layers(model))
