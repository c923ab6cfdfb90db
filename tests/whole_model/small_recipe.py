"""Every recipe as it is, with its sizes shrunk: routing, groups, balancers and capacity are the recipe's own."""

import torch

import himoe
from himoe.build import build_model
from himoe.config import load_config

VOCAB, END = 31, 0


def small_recipe(name: str, *, sets: tuple[str, ...] = ()):
    """Return a small model of a recipe in fp64, with weights so large and states so far that routing is uneven."""
    heads = load_config(name).model.num_heads
    sizes = [
        "model.num_layers=2",
        f"model.dim={64 // heads // 2 * 2 * heads}",
        "model.ffn_dim=16",
        "moe.expert_dim=8",
    ]
    model = build_model(load_config(name, sets=[*sizes, *sets]), VOCAB).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
        for step in range(2):
            himoe.observe(model, model(tokens(3, 10, seed=90 + step))[1])
            himoe.step(model)
    return model


def tokens(rows: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Return random ids, none of which ends a document."""
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
