"""Small MoE layers and models for tests."""

import torch
from torch import nn

from himoe import MoE, MoEAdapter, SwiGLUExperts, presets

D, E, K = 16, 8, 4

PRESETS = {
    "hi_moe": {"num_groups": 4},
    "hi_moe explicit groups": {"groups": [[0, 2, 4], [1, 3], [5, 7, 6]], "top_k": [2, 1, 1]},
    "hi_moe_paper": {"num_groups": 4},
    "hi_moe_official": {"num_groups": 4},
    "moge": {"num_groups": 2},
    "switch": {"top_k": 1},
    "loss_free": {"top_k": 3},
}


def make_router(preset="hi_moe", *, seed=0, **options):
    torch.manual_seed(seed)
    options = {"dim": D, "num_experts": E, "top_k": K, **PRESETS[preset], **options}
    return getattr(presets, preset.split()[0])(**options)


def make_moe(
    preset="hi_moe", *, seed=0, experts=SwiGLUExperts, backend="auto", dispatcher=None, shared=None, **options
):
    router = make_router(preset, seed=seed, **options)
    experts = experts(router.num_experts, router.gate.weight.shape[1], 12, backend=backend)
    return MoE(router, experts, dispatcher=dispatcher, shared_expert=shared)


def tokens(*shape, seed=0, dtype=torch.float32, width=D):
    return torch.randn(*shape, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Residual(nn.Module):
    """Somebody else's model: blocks that expect a network with one output."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(MoEAdapter(layer) for layer in layers)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x
