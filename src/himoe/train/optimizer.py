"""AdamW (Loshchilov & Hutter, 1711.05101) with the right parameters decayed.

Decayed: every matrix, that is projections, stacked expert weights, the gate and the embeddings (the tied embedding is
also the output head). Not decayed: vectors (norm gains, biases, a learned expert scale). Balancer state lives in
buffers and never meets the optimizer.
"""

from typing import Any

import torch
from torch import nn

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


def build_optimizer(
    model: nn.Module, learning_rate: float, *, weight_decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """Return AdamW over all trainable parameters, fused into one kernel where the device has one.

    >>> optimizer = build_optimizer(nn.Linear(2, 2), 1e-3)
    >>> [group["weight_decay"] for group in optimizer.param_groups]
    [0.1, 0.0]
    """
    groups = [group for group in decay_groups(model, weight_decay) if group["params"]]
    fused = all(parameter.device.type in FUSED_DEVICES for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)
