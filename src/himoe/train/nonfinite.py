"""Where NaN or infinity first appears: the weights, then the outputs of a forward pass, then the gradients."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from himoe.errors import HimoeError


@dataclass(frozen=True)
class NonFinite:
    """A tensor with NaN or infinity: the weight, state (a buffer), output or gradient called `name`."""

    what: str
    name: str
    layer: int | None

    def __str__(self) -> str:
        where = "" if self.layer is None else f" (layer {self.layer})"
        return f"the {self.what} of {self.name}{where}"


class NonFiniteLossError(HimoeError):
    """A held-out loss that is not finite, and the first place in the model that is not, where there is one."""

    def __init__(self, loss: float, place: NonFinite | None) -> None:
        found = f" (first not finite: {place})" if place else ""
        super().__init__(f"the held-out loss is {loss}{found}: the weights have diverged; lower train.learning_rate")
        self.place = place


@torch.no_grad()
def find_nonfinite(model: nn.Module, forward: Callable[[], object] | None = None) -> NonFinite | None:
    """Return the first place that is not finite, None where all is; it waits for the device at every tensor.

    Weights and outputs are searched in the order of the forward pass, and the first is where it began. Gradients come
    into being from the other end, so of them the last in that order is returned.

    Args:
        model: modules registered in the order in which they run.
        forward: runs the model once more; without it outputs are not searched.
    """
    for what, tensors in (("weight", model.named_parameters()), ("state", model.named_buffers())):
        for name, tensor in tensors:
            if not _is_finite(tensor):
                return NonFinite(what, name, _layer(model, name))
    if forward is not None and (name := _first_output(model, forward)) is not None:
        return NonFinite("output", name or type(model).__name__, _layer(model, name))
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not _is_finite(parameter.grad):
            return NonFinite("gradient", name, _layer(model, name))
    return None


def _first_output(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Return the name of the first module whose output is not finite; a part comes before the whole it belongs to."""
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:  # noqa: ARG001 - the form of a hook
            if not found and not all(_is_finite(leaf) for leaf in pytree.tree_leaves(output)):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled blocks would not call the hooks
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _is_finite(value: object) -> bool:
    return not isinstance(value, Tensor) or bool(torch.isfinite(value).all())


def _layer(model: nn.Module, name: str) -> int | None:
    """Return the number in `name` that counts the model's layers: the place in the first list of modules on the way."""
    module = model
    for part in name.split("."):
        if isinstance(module, nn.ModuleList):
            return int(part)
        module = getattr(module, part, None)
        if not isinstance(module, nn.Module):
            return None
    return None
