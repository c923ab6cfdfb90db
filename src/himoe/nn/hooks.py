"""The three calls that a training loop makes, ours or anybody's.

```python
loss = task_loss + sum(aux_losses(model, routings).values())
loss.backward()
observe(model, routings)  # every micro-batch
optimizer.step()
step(model)  # every optimizer step
```
"""

from collections.abc import Sequence
from typing import TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn

from himoe.balance import Balancer, step_balancers
from himoe.balance.base import STEP_COUNTS, add_over_ranks, over_ranks
from himoe.errors import ConfigError
from himoe.functional.stats import selected_load
from himoe.nn.moe import MoE, moe_layers
from himoe.types import RouterContext, Routing

Routings = Sequence[Routing | None]


def _pairs(model: nn.Module, routings: Routings) -> list[tuple[MoE, Routing | None]]:
    """Return every layer with its routing, None for a layer that did not run."""
    layers = moe_layers(model)
    if len(layers) != len(routings):
        raise ConfigError(f"{len(routings)} routings for {len(layers)} MoE layers: pass one per layer, in layer order")
    for i, (layer, routing) in enumerate(zip(layers, routings, strict=True)):
        if routing is not None and routing.num_experts != layer.router.num_experts:
            raise ConfigError(
                f"routing {i} has {routing.num_experts} experts, MoE layer {i} has {layer.router.num_experts}: "
                "pass the routings in layer order"
            )
    return list(zip(layers, routings, strict=True))


def _with_step_counts(pairs: list[tuple[MoE, Routing | None]]) -> list[tuple[MoE, Routing | None]]:
    """Fill in `step_counts` where a balancer asks for them: one all-reduce for all layers, none if nobody asks.

    A layer that did not run, or ran in eval mode, takes part with what it has counted before, so that every rank
    reduces equally many numbers. Where all that ran was in eval mode, the other ranks are not waited for: those may
    evaluate less.
    """
    if not any(_trains(routing) for _, routing in pairs) and any(routing is not None for _, routing in pairs):
        return pairs
    counts: list[dict[str, Tensor]] = []
    seen: set[Balancer] = set()
    for i, (layer, routing) in enumerate(pairs):
        parts = (part for part in layer.router.balancer.modules() if isinstance(part, Balancer))
        asking = next((part for part in parts if part.needs_step_counts), None)  # an outer part before its inner ones
        if asking in seen:
            raise ConfigError(
                f"aux_losses: MoE layer {i} shares its {type(asking).__name__} with another layer, and the counts of "
                "both would cancel out: give every layer its own"
            )
        seen |= set() if asking is None else {asking}
        counts.append(
            {} if asking is None else {STEP_COUNTS: _counted(layer, routing) + asking.sums.get(STEP_COUNTS, 0)}
        )
    add_over_ranks(counts)
    return [
        (layer, routing.replace(step_counts=found[STEP_COUNTS]) if _trains(routing) and found else routing)
        for (layer, routing), found in zip(pairs, counts, strict=True)
    ]


def _trains(routing: Routing | None) -> TypeGuard[Routing]:
    return routing is not None and routing.context.training


def _counted(layer: MoE, routing: Routing | None) -> Tensor:
    if _trains(routing):
        return selected_load(routing)
    device = next(layer.parameters(), torch.empty(0)).device
    return torch.zeros(layer.router.num_experts, dtype=torch.int64, device=device)


def aux_losses(model: nn.Module, routings: Routings) -> dict[str, Float[Tensor, ""]]:
    """Return the named auxiliary losses, each layer's computed by itself, then summed over layers.

    Call it before `observe` of the same routings, and on every rank: a balancer over the global batch adds up its
    counts over the ranks here.

    Args:
        model: holds the MoE layers.
        routings: one per layer in the order of `moe_layers(model)`; None for a layer that did not run.

    Raises:
        ConfigError: routings that do not belong to the layers, or that carry no gradient though the gate is trained
            (reentrant activation checkpointing does that: use `use_reentrant=False`).
    """
    total: dict[str, Tensor] = {}
    for i, (layer, routing) in enumerate(_with_step_counts(_pairs(model, routings))):
        if routing is None:
            continue
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
        if routing is not None and routing.context.training:
            layer.router.balancer.observe(routing)


@torch.no_grad()
def step(model: nn.Module) -> None:
    """Move every balancer's state, once per optimizer step: one all-reduce for the whole model.

    A layer that did not run on this rank takes part with no tokens, since it may have run on another.
    """
    layers = moe_layers(model)
    for layer in layers if over_ranks() else []:
        parts = [part for part in layer.router.balancer.modules() if isinstance(part, Balancer)]
        if not any(part.sums for part in parts) and any(type(part).observe is not Balancer.observe for part in parts):
            layer.router.balancer.observe(_no_tokens(layer))
    step_balancers(layer.router.balancer for layer in layers)


def _no_tokens(layer: MoE) -> Routing:
    """Return the routing of an empty batch, without running the gate: it may be sharded or wait for other ranks."""
    device = next(layer.router.parameters(), torch.empty(0)).device
    values = torch.zeros(0, layer.router.num_experts, device=device)
    ids = torch.zeros(0, layer.router.top_k, dtype=torch.int64, device=device)
    weight = getattr(layer.router.gate, "weight", None)
    context = RouterContext(batch_shape=(0,), gate_weight=weight, noise=values, noise_std=values, training=True)
    return Routing(values, values, ids, ids.to(values.dtype), ids.bool(), ids.bool(), context)
