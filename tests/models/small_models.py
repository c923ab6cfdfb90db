"""Small language models for tests."""

import torch

from himoe import DecoderLM, MoE, SwiGLUExperts, presets
from himoe.nn import SwiGLU

V, D, HEADS = 40, 16, 2


def make_moe(preset="hi_moe", *, dim=D, num_experts=8, expert_dim=12, shared_dim=0, dispatcher=None, **options):
    if preset.startswith(("hi_moe", "moge")) and "groups" not in options:
        options = {"num_groups": 4, **options}
    router = getattr(presets, preset)(dim, num_experts, **{"top_k": 4, **options})
    shared = SwiGLU(dim, shared_dim) if shared_dim else None
    return MoE(router, SwiGLUExperts(num_experts, dim, expert_dim), dispatcher=dispatcher, shared_expert=shared)


def make_lm(feed_forward=lambda layer: make_moe(), *, seed=0, **options):
    torch.manual_seed(seed)
    options = {"vocab_size": V, "dim": D, "num_layers": 2, "num_heads": HEADS, **options}
    return DecoderLM(feed_forward=feed_forward, **options)


def token_ids(*shape, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))
