"""`Balancer`: what keeps experts evenly used, as five hooks that all do nothing by default.

    adjust_logits ─ score ─ adjust_choice ─ select      in the forward pass: read state, never write it
    losses                                              after the forward pass: this layer's weighted scalars
    observe                                             after each backward: add to the sums of this step
    step                                                once per optimizer step: move the state

Because only `observe` and `step` write, a forward pass can be recomputed, compiled, repeated or evaluated at will.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from himoe.types import RouterContext, Routing

STEP_COUNTS = "step_counts"
"""Name of the sum (E,) in which a balancer with `needs_step_counts` counts the selected pairs it has observed."""


class Balancer(nn.Module):
    """Base of all balancing strategies; override the hooks you need.

    State lives in buffers. They are saved in checkpoints, keep their dtype through `.to(torch.bfloat16)`, and move only
    in `step`. What `observe` collects goes through `accumulate` into `self.sums`; `step_balancers` adds the sums of all
    ranks before `step` reads them, and empties them afterwards.
    """

    balances_load: ClassVar[bool] = False
    """True for a strategy that by itself drives the experts towards equal load."""

    toy_options: ClassVar[Mapping[str, Any]] = {}
    """Options with which it acts within some hundred steps on a toy, where its defaults are made for thousands."""

    loss_names: ClassVar[tuple[str, ...]] = ()
    """Names of all losses that it may return; what is not stated is not checked."""

    alpha: float | None = None
    """Weight of a loss that near balance pulls as `Switch` of this weight does; None for all other strategies."""

    causal: bool = True
    """False for a strategy with which a later token can change an earlier one's routing: not for language models."""

    bias_step: float | None = None
    """How far an optimizer step moves what is added to the scores of the choice, where that is a rate; else None."""

    bias_multiplies: bool = False
    """True where scores are multiplied instead, by a factor that `bias_step` moves."""

    needs_noise: ClassVar[bool] = False
    """True for a strategy whose losses need a gate that adds noise, one with a method `noise_std`."""

    needs_step_counts: bool = False
    """True for a strategy whose losses read `routing.step_counts`; its `observe` accumulates them as `STEP_COUNTS`."""

    passes_on: ClassVar[bool] = False
    """True for a balancer around others that adds no losses and no moves of its own to theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[str, Tensor] = {}
        self.register_load_state_dict_pre_hook(_restore_dtypes)

    def adjust_logits(self, logits: Float[Tensor, "T E"], context: RouterContext) -> Float[Tensor, "T E"]:  # noqa: ARG002
        """Change logits before the score function: moves the choice and the weights."""
        return logits

    def adjust_choice(self, scores: Float[Tensor, "T E"], context: RouterContext) -> Float[Tensor, "T E"]:  # noqa: ARG002
        """Change the scores that the selector sees: moves the choice only."""
        return scores

    def adds_to_choice(self) -> list[Float[Tensor, " E"]] | None:
        """Return the vectors that `adjust_choice` adds to every token's scores; None where it does anything else.

        For the fused router, which needs no Python between score and choice. Say nothing, and the general path runs.
        """
        return [] if type(self).adjust_choice is Balancer.adjust_choice else None

    def losses(self, routing: Routing) -> dict[str, Float[Tensor, ""]]:  # noqa: ARG002
        """Return this layer's named, weighted scalar losses."""
        return {}

    def observe(self, routing: Routing) -> None:
        """Add one micro-batch to the sums of this step, and nothing else."""

    def step(self) -> None:
        """Move the state, from `self.sums`."""

    def reset_parameters(self) -> None:
        """Set the state to its start, also after `to_empty` on a model that was built on the meta device."""

    def accumulate(self, name: str, value: Tensor) -> None:
        """Add `value` to the sum called `name` of the running optimizer step. Use int64 for counts, fp64 for sums."""
        value = value.detach()
        self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def _apply(self, fn, recurse: bool = True) -> Self:
        """Follow device moves, but keep every buffer's dtype: balancing in bf16 would lose small steps."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


def _restore_dtypes(balancer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give saved state the dtype it has here, also where the checkpoint was cast as a whole."""
    for name, buffer in balancer._buffers.items():
        if buffer is not None and isinstance(saved := state_dict.get(prefix + name), Tensor):
            state_dict[prefix + name] = saved.to(buffer.dtype)


@torch.no_grad()
def step_balancers(balancers: Iterable[Balancer]) -> None:
    """Add up the sums of all ranks in one all-reduce, let every balancer step, and empty the sums."""
    outer = list(dict.fromkeys(balancers))  # one that two layers share moves once
    every = list(dict.fromkeys(m for b in outer for m in b.modules() if isinstance(m, Balancer)))
    add_over_ranks([m.sums for m in every])
    for balancer in outer:
        balancer.step()
    for balancer in every:
        balancer.sums.clear()


def over_ranks() -> bool:
    """Return whether there are other ranks to add up with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def add_over_ranks(sums: list[dict[str, Tensor]]) -> None:
    """Replace every tensor by its sum over ranks: one stacked fp64 all-reduce, exact for counts below 2⁵³."""
    places = [(holder, name) for holder in sums for name in sorted(holder)]
    if not places or not over_ranks():
        return
    stacked = torch.cat([holder[name].flatten().to(torch.float64) for holder, name in places])
    dist.all_reduce(stacked)
    start = 0
    for holder, name in places:
        value = holder[name]
        holder[name] = stacked[start : start + value.numel()].view_as(value).to(value.dtype)
        start += value.numel()
