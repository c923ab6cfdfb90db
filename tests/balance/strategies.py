"""Every entry of the table of balancers for a small layer, and routings that each of them can look at."""

import dataclasses
import inspect

import torch
from free_router import random_logits, route
from torch import Tensor

from himoe import Balancer, Routing, registry

E, G, D, T = 8, 4, 10, 11
COEFFICIENTS = ("weight", "lambda_intra", "lambda_inter")


def build(name: str, **options) -> Balancer:
    """The entry with what the layer gives, and those of the options that it has."""
    constructor = registry.load("balancers", name)
    given = {"num_experts": E, "groups": G, "top_k": 2} | options
    known = inspect.signature(constructor).parameters
    return constructor(**{key: value for key, value in given.items() if key in known})


def look(
    weight: Tensor, x: Tensor, k: int = 2, *, noise: Tensor | None = None, std: Tensor | None = None, **options
) -> Routing:
    """The routing of a noisy gate with this matrix."""
    logits = x @ weight.T
    noise = random_logits(99, *logits.shape, scale=0.5) if noise is None else noise
    std = torch.full_like(noise, 0.5) if std is None else std
    routing = route(logits + noise, k, **options)
    context = dataclasses.replace(routing.context, noise=noise, noise_std=std, gate_weight=weight)
    return routing.replace(logits=logits, context=context)


def random_look(seed: int = 0, tokens: int = T, k: int = 2, **options) -> Routing:
    """Tokens and a gate at random, of which the first experts are the larger."""
    weight = random_logits(seed, E, D) * torch.linspace(1.5, 0.5, E, dtype=torch.float64)[:, None]
    return look(weight, random_logits(seed + 1, tokens, D) + 0.3, k, **options)


def coefficients(name: str) -> list[str]:
    """The options of an entry that its losses are multiplied by."""
    return [key for key in inspect.signature(registry.load("balancers", name)).parameters if key in COEFFICIENTS]


WITH_LOSSES = [name for name in registry.BALANCERS if build(name).losses(random_look())]
