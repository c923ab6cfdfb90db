"""Which parameter is updated how: AdamW (Loshchilov & Hutter, 1711.05101), or Muon and AdamW together (`muon.py`).

Decayed: every matrix, that is projections, stacked expert weights, the gate and the embeddings (the tied embedding is
also the output head). Not decayed: vectors (norm gains, biases, a learned expert scale). Balancer state lives in
buffers and never meets the optimizer.

Muon's: the matrices of attention, dense layers, experts and shared experts, found by type. AdamW's: embeddings, which
the vectors of constant experts are too, head, gates and everything in a router, all vectors, and what stands outside of
blocks and MoE layers.
"""

from typing import Any

import torch
from torch import Tensor, nn

from himoe.models.attention import Attention
from himoe.models.lm import Block
from himoe.nn import Gate, MoE, Router
from himoe.train.muon import Muon

FUSED_DEVICES = ("cpu", "cuda")


def decays(parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies to `parameter`.

    >>> decays(nn.Parameter(torch.zeros(2, 3))), decays(nn.Parameter(torch.zeros(3)))
    (True, False)
    """
    return parameter.ndim >= 2


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into a decayed and an undecayed group, each tied weight once."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if decays(p)], "weight_decay": weight_decay},
        {"params": [p for p in trainable if not decays(p)], "weight_decay": 0.0},
    ]


def hidden_matrices(model: nn.Module) -> dict[nn.Parameter, tuple[int, ...]]:
    """Return the parameters that are hidden matrices, each with the rows of the matrices that are fused in it."""
    fused: dict[Tensor, tuple[int, ...]] = {}
    inside: dict[nn.Parameter, None] = {}
    others: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, Block | MoE):
            inside |= dict.fromkeys(module.parameters())
        elif isinstance(module, Router | Gate | nn.Embedding):
            others |= set(module.parameters())
        elif isinstance(module, Attention):
            heads = (module.num_heads, module.num_kv_heads, module.num_kv_heads)
            fused[module.qkv_proj.weight] = tuple(number * module.head_dim for number in heads)
        elif (both := getattr(module, "gate_up_proj", None)) is not None:
            weight = both.weight if isinstance(both, nn.Linear) else both
            fused[weight] = (weight.shape[-2] // 2,) * 2
    matrices = [parameter for parameter in inside if parameter.ndim in (2, 3) and parameter not in others]
    return {matrix: fused.get(matrix, (matrix.shape[-2],)) for matrix in matrices}


def muon_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the groups of `decay_groups` without the hidden matrices, and those by the rows of their parts."""
    hidden, by_rows = hidden_matrices(model), {}
    groups = decay_groups(model, weight_decay)
    for group in groups:
        for parameter in group["params"]:
            if parameter in hidden:
                by_rows.setdefault(hidden[parameter], []).append(parameter)
        group["params"] = [parameter for parameter in group["params"] if parameter not in hidden]
    return [*groups, *({"params": found, "weight_decay": weight_decay, "rows": r} for r, found in by_rows.items())]


def build_optimizer(
    model: nn.Module,
    learning_rate: float,
    *,
    optimizer: str = "adamw",
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    muon_momentum: float = 0.95,
) -> torch.optim.Optimizer:
    """Return the optimizer "adamw" or "muon" over all trainable parameters, AdamW fused where the device can.

    >>> built = build_optimizer(nn.Linear(2, 2), 1e-3)
    >>> [group["weight_decay"] for group in built.param_groups]
    [0.1, 0.0]
    """
    assert optimizer in ("adamw", "muon"), optimizer
    groups = (muon_groups if optimizer == "muon" else decay_groups)(model, weight_decay)
    groups = [group for group in groups if group["params"]]
    if optimizer == "muon":
        return Muon(groups, learning_rate, momentum=muon_momentum, betas=betas)
    fused = all(parameter.device.type in FUSED_DEVICES for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)
