"""Exact parameter counts of a real model, in the three conventions in use."""

from dataclasses import dataclass

from torch import nn

from himoe.nn import moe_layers


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters; a tied embedding counts once.

    Attributes:
        total: all of them.
        active: what one token uses, both embeddings included: routed experts count K/E.
        active_without_input_embedding: `active` without the input embedding, unless the head is tied to it.
        active_without_embeddings: `active` without input embedding and head.
    """

    total: int
    active: int
    active_without_input_embedding: int
    active_without_embeddings: int


def parameter_counts(model: nn.Module) -> ParameterCounts:
    """Count a model that has `embedding` and `head` modules, such as `DecoderLM`; works on the meta device.

    The K of a layer is the number of places that its selector has for every token: where the number of experts varies,
    the most that a token may have.
    """
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for layer in moe_layers(model):
        routed = sum(p.numel() for p in layer.experts.parameters())
        idle += routed - routed * layer.router.top_k // layer.router.num_experts
    embedding: nn.Parameter = model.embedding.weight  # type: ignore[assignment]
    head: nn.Parameter = model.head.weight  # type: ignore[assignment]
    tied = embedding is head
    active = total - idle
    without_input = active if tied else active - embedding.numel()
    return ParameterCounts(
        total=total,
        active=active,
        active_without_input_embedding=without_input,
        active_without_embeddings=without_input - head.numel(),
    )
