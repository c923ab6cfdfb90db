"""A clock with one hand: at every moment a step's time counts for one part, so the parts add up to the whole.

Forward, hooks of the modules move the hand. Backward, marks in the graph do: autograd runs the nodes of a module one
after the other in reverse, so an identity at the module's output moves the hand to it, and one at its input moves it
away. What is recomputed in backward counts for its module. What the trainer itself does is wrapped where it is called.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from himoe.models.attention import Attention
from himoe.nn import MoE, Router, moe_layers
from himoe.train import loop
from himoe.train.loop import Trainer
from himoe.types import Routing

REST = "rest"
PARTS = (
    "attention", "router", "dispatch", "experts", "dense layers", "loss", "optimizer", "balancers",
    "statistics", "data", REST,
)  # fmt: skip


class Laps:
    """Adds up the seconds of every part; `device` "cuda" waits for the GPU whenever the hand moves."""

    def __init__(self, device: str = "cpu") -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.routings: dict[nn.Module, Routing] = {}
        """The last routing of every router."""
        self._device, self._part, self._since = device, REST, time.perf_counter()

    def start(self) -> None:
        """Set the hand to the rest; what was before does not count."""
        self._part, self._since = REST, time.perf_counter()

    def switch(self, part: str) -> str:
        """Move the hand; return where it was."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self._part] += now - self._since
        before, self._part, self._since = self._part, part, now
        return before

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with its time counted for a part."""

        def timed(*args: Any, **options: Any) -> Any:
            before = self.switch(part)
            try:
                return function(*args, **options)
            finally:
                self.switch(before)

        return timed


class _Mark(torch.autograd.Function):
    """The identity; in backward it moves the hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, laps: Laps, part: str) -> Tensor:
        ctx.laps, ctx.part = laps, part
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.laps.switch(ctx.part)
        return grads[0], None, None


class _Follower:
    """The hooks of one module; calls may be nested, when backward recomputes."""

    def __init__(self, laps: Laps, part: str, *, marks: bool = True) -> None:
        self.laps, self.part, self.marks = laps, part, marks
        self.before: list[str] = []

    def enter(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Move the hand here, and away again when backward comes out of the module's input."""
        self.before.append(self.laps.switch(self.part))
        if not self.marks or not isinstance(args[0], Tensor) or not args[0].requires_grad:
            return None
        return (_Mark.apply(args[0], self.laps, REST), *args[1:])

    def leave(self, module: nn.Module, _args: Any, output: Any) -> Any:
        """Move the hand back, and here again when backward comes to the module's output."""
        marked = None
        if isinstance(output, Routing):
            self.laps.routings[module] = output
            if output.weights.requires_grad:
                marked = output.replace(weights=_Mark.apply(output.weights, self.laps, self.part))
        elif self.marks and isinstance(output, Tensor) and output.requires_grad:
            marked = _Mark.apply(output, self.laps, self.part)
        self.laps.switch(self.before.pop())
        return marked

    def on(self, module: nn.Module, stack: ExitStack) -> None:
        """Follow a module until the stack closes."""
        stack.callback(module.register_forward_pre_hook(self.enter).remove)
        stack.callback(module.register_forward_hook(self.leave, always_call=True).remove)


def _parts_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, bool]]:
    """Yield the modules that are parts, and whether backward passes through them and nothing else."""
    for layer in moe_layers(model):
        yield layer.experts, "experts", True
        yield layer.dispatcher, "dispatch", False
        if layer.shared_expert is not None:
            yield layer.shared_expert, "experts", True
    for module in model.modules():
        if isinstance(module, Attention):
            yield module, "attention", True
        elif isinstance(module, Router):
            yield module, "router", True
        feed_forward = getattr(module, "feed_forward", None)
        if isinstance(feed_forward, nn.Module) and not isinstance(feed_forward, MoE):
            yield feed_forward, "dense layers", True


def _loss_begins(laps: Laps, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
    """From the last norm on it is the loss, the head's product in it, until backward comes back here."""
    laps.switch("loss")
    return _Mark.apply(output, laps, REST) if output.requires_grad else None


@contextmanager
def following(trainer: Trainer, laps: Laps) -> Iterator[None]:
    """Let the hand follow every step of a trainer."""
    with ExitStack() as stack:
        for module, part, marks in _parts_of(trainer.model):
            _Follower(laps, part, marks=marks).on(module, stack)
        if isinstance(norm := getattr(trainer.model, "norm", None), nn.Module):
            stack.callback(norm.register_forward_hook(partial(_loss_begins, laps)).remove)
        for owner, method, part in _methods(trainer):
            stack.enter_context(patch.object(owner, method, laps.around(part, getattr(owner, method))))
        balancers = {"observe": "balancers", "step": "balancers", "aux_losses": "loss"}
        stack.enter_context(_replaced(loop, "moe", laps, balancers))
        for name in ("get_total_norm", "clip_grads_with_norm_"):
            stack.enter_context(patch.object(loop, name, laps.around("optimizer", getattr(loop, name))))
        laps.start()
        yield
        laps.switch(REST)


def _methods(trainer: Trainer) -> list[tuple[object, str, str]]:
    """Return the methods that a trainer calls on its own objects, and the part that each is."""
    return [
        (trainer.batches, "micro_batch", "data"),
        (trainer.optimizer, "step", "optimizer"),
        (trainer.optimizer, "zero_grad", "optimizer"),
        (trainer.statistics, "observe", "statistics"),
        (trainer.statistics, "end_step", "statistics"),
        (trainer.means, "add", "statistics"),
        (trainer.monitor, "after_first_micro_batch", "statistics"),
        (trainer.monitor, "before_clipping", "statistics"),
        *([(trainer.ema, "update", "optimizer")] if trainer.ema else []),
    ]


@contextmanager
def _replaced(module: ModuleType, name: str, laps: Laps, parts: Mapping[str, str]) -> Iterator[None]:
    """Let a module see another one's functions with their time counted."""
    other = getattr(module, name)
    timed = {function: laps.around(part, getattr(other, function)) for function, part in parts.items()}
    with patch.object(module, name, SimpleNamespace(**timed)):
        yield
