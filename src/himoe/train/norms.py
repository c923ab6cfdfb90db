"""Norms of gradient and weights per role: which part of the model learns fast, slowly or not at all.

Roles go by the type of the modules, never by parameter names:

| role | parameters |
|---|---|
| `embedding` | of `nn.Embedding`; a head that is tied to it is the same parameter and counts here |
| `attention` | of `Attention`, its norms apart |
| `router`, `experts`, `shared_expert` | of the three parts of an `MoE` |
| `norm` | of `nn.RMSNorm` and `nn.LayerNorm`, wherever they stand |
| `head` | of a linear layer directly under the model |
| `ffn` | all others: the layers that are not MoE layers |
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from himoe.models.attention import Attention
from himoe.nn import MoE

ROLES = ("embedding", "attention", "router", "experts", "shared_expert", "ffn", "norm", "head")
MOE_PARTS = ("router", "experts", "shared_expert")


def parameters_by_role(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the trained parameters of each role that the model has, in the order of `ROLES`; each stands once.

    >>> from himoe.nn import SwiGLU
    >>> {
    ...     role: len(found)
    ...     for role, found in parameters_by_role(nn.Sequential(nn.Embedding(4, 2), SwiGLU(2, 3))).items()
    ... }
    {'embedding': 1, 'ffn': 2}
    """
    found: dict[str, list[nn.Parameter]] = {role: [] for role in ROLES}
    seen: set[nn.Parameter] = set()
    for role, module in _modules(model, "ffn", depth=0):
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                found[role].append(parameter)
    return {role: parameters for role, parameters in found.items() if parameters}


def _modules(module: nn.Module, role: str, *, depth: int, part: str | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Yield (role, module) for every module; a child has its parent's role unless its type says another."""
    if part is not None:
        role = part
    elif isinstance(module, nn.Embedding):
        role = "embedding"
    elif isinstance(module, Attention):
        role = "attention"
    elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
        role = "norm"
    elif isinstance(module, nn.Linear) and depth == 1:
        role = "head"
    yield role, module
    for name, child in module.named_children():
        child_part = name if isinstance(module, MoE) and name in MOE_PARTS else None
        yield from _modules(child, role, depth=depth + 1, part=child_part)


class RoleNorms:
    """Measures the norms of every role and keeps them on the device until they are read, all at once.

    Args:
        model: its parameters are sorted into roles once, here.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = parameters_by_role(model)
        self._measured: Tensor | None = None

    @torch.no_grad()
    def measure(self) -> None:
        """Take the norms, after the last backward of a step and before clipping."""
        rows = []
        for parameters in self._parameters.values():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            rows += [get_total_norm(gradients), get_total_norm(parameters)]  # each one multi-tensor kernel
        device = next(iter(self._parameters.values()))[0].device
        self._measured = torch.stack([row.to(device) for row in rows])

    @property
    def gradient(self) -> Tensor:
        """Norm of the gradient of all roles together, as last measured, on the device."""
        assert self._measured is not None, "measure() comes first"
        return self._measured[0::2].norm()

    def read(self) -> dict[str, dict[str, float]] | None:
        """Return `{role: {"grad": …, "weight": …}}` as last measured, once; None when nothing was measured since."""
        if self._measured is None:
            return None
        values = self._measured.view(-1, 2).tolist()
        self._measured = None
        return {
            role: {"grad": grad, "weight": weight}
            for role, (grad, weight) in zip(self._parameters, values, strict=True)
        }
