"""Real routing: what a trained run's router chose for its own held-out text, in the layer of the largest load.

The run's model reads windows of the text as in training, in eval mode, and its choices are taken as they are: with the
skew that training left, and with neighbouring tokens that go together, which no draw from loads would have. So the
shape is the run's own too.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from himoe.bench.problem import Choice
from himoe.bench.shapes import Shape
from himoe.errors import ConfigError
from himoe.functional.stats import load
from himoe.nn import SwiGLUExperts, moe_layers
from himoe.trained import held_out, load_corpus, load_run
from himoe.types import Routing


@dataclass(frozen=True)
class RealRouting:
    """A run's layer: its sizes, who went where, and which layer it is."""

    shape: Shape
    choice: Choice
    layer: int


@torch.no_grad()
def real_routing(run: Path, console: Console, *, tokens: int | None = None) -> RealRouting:
    """Return the routing of `tokens` tokens, by default those of one of the run's micro-batches.

    Raises:
        ConfigError: a run whose layers do not take the same number of experts for every token, or have other experts.
    """
    loaded = load_run(run)
    settings = loaded.config.train
    rows = max(1, (tokens or settings.batch_size // settings.accumulate * settings.seq_len) // settings.seq_len)
    streams = held_out(load_corpus(loaded.config, console)).values()
    ids = np.concatenate([text.tokens[: rows * settings.seq_len] for text in streams]).astype(np.int64)
    if len(ids) < rows * settings.seq_len:
        ids = np.resize(ids, rows * settings.seq_len)  # a short text is read again from its start
    inputs = torch.from_numpy(ids[: rows * settings.seq_len]).view(rows, settings.seq_len)
    layers = moe_layers(loaded.model)
    if not layers or not all(isinstance(layer.experts, SwiGLUExperts) for layer in layers):
        raise ConfigError(f"--run {run}: its model must have MoE layers, all with swiglu experts")
    _, routings = loaded.model(inputs.to(next(loaded.model.parameters()).device))
    which = max(range(len(routings)), key=lambda number: int(load(routings[number]).max()))
    experts, routing = layers[which].experts, routings[which]
    num_experts, dim, hidden_dim = experts.get_parameter("down_proj").shape
    shape = Shape(run.name, inputs.numel(), dim, hidden_dim, num_experts, routing.top_k, f"run {run}")
    return RealRouting(shape, _choice(routing, run), loaded.model.moe_layer_indices()[which])


def _choice(routing: Routing, run: Path) -> Choice:
    if not bool(routing.kept.all()):
        raise ConfigError(
            f"--run {run}: its tokens do not all take {routing.top_k} experts; choose a run with plain top-k"
        )
    weights = routing.weights.float()
    return Choice(routing.expert_ids.cpu(), (weights / weights.sum(-1, keepdim=True)).cpu())
