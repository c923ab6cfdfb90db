"""A whole training step: our model, and the same model with transformers' grouped_mm experts in its layers.

Both start from the same weights and see the same tokens; their losses and gradients are compared before any step is
timed. Beside the ratio of the steps stands what Amdahl's law allows: with a share s of the peer's step in its experts,
and experts that are r times as fast, no step can be more than 1/(1 − s + s/r) times as fast.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from himoe.bench.clock import Times, time_one
from himoe.bench.peers import transformers_experts
from himoe.bench.ratios import amdahl
from himoe.bench.right import TOLERANCE, worst_row
from himoe.bench.step import WARM_UP, Clocked, clocked_step, record
from himoe.build import build_groups, build_model
from himoe.config import Config, load_config
from himoe.errors import HimoeError, MissingExtraError
from himoe.models import DecoderLM
from himoe.nn import moe_layers
from himoe.train.batches import Batch
from himoe.train.loop import Trainer
from himoe.train.optimizer import build_optimizer
from himoe.train.statistics import Statistics

VOCAB = 4096


class WrongPeerError(HimoeError):
    """The two models do not compute the same."""


class RandomRows:
    """The rows of every step: a function of the step alone."""

    def __init__(self, rows: int, length: int) -> None:
        self.batch_size, self.accumulate, self.length, self.wait_seconds = rows, 1, length, 0.0

    def micro_batch(self, step: int, index: int) -> Batch:
        """Return the rows of a step."""
        shape = (self.batch_size, self.length + 1)
        return Batch(np.random.default_rng((step, index)).integers(VOCAB, size=shape), None)


class _Swapped(nn.Module):
    """Experts of transformers on the weights of ours, called as ours are."""

    def __init__(self, ours: nn.Module, implementation: str) -> None:
        super().__init__()
        self.num_experts = ours.num_experts
        up, down = (ours.get_parameter(name) for name in ("gate_up_proj", "down_proj"))
        self.module = transformers_experts(up, down, implementation)

    def forward(self, x: Tensor, expert_ids: Tensor, weights: Tensor, kept: Tensor) -> Tensor:  # noqa: ARG002
        return self.module(x, expert_ids, weights)


def model_config(
    *, layers: int = 6, dim: int = 256, experts: int = 64, top_k: int = 8, hidden_dim: int = 128, tokens: int = 1024
) -> Config:
    """Return the configuration of the model: `lm_small` in these sizes, two rows of half the tokens."""
    heads = max(1, dim // 64)
    sizes = {
        "model.num_layers": layers, "model.dim": dim, "model.num_heads": heads, "model.num_kv_heads": heads,
        "moe.num_experts": experts, "moe.top_k": top_k, "moe.num_groups": 4, "moe.expert_dim": hidden_dim,
        "train.batch_size": 2, "train.seq_len": tokens // 2,
    }  # fmt: skip
    return load_config("lm_small", sets=[f"{key}={value}" for key, value in sizes.items()])


def measure_model(
    config: Config,
    *,
    steps: int,
    device: str = "cpu",
    peer: str = "grouped_mm",
    say: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Return step times of both models, their ratio, and Amdahl's bound, see docs/benchmarks.md.

    Raises:
        MissingExtraError: transformers is not installed.
        WrongPeerError: loss or gradients differ.
    """
    model = build_model(config, VOCAB).to(device)
    trainers = {"ours": _trainer(config, model), f"hf_{peer.removesuffix('_mm')}": _trainer(config, _swap(model, peer))}
    say("comparing losses and gradients")
    _compare(trainers)
    plain = {name: Times() for name in trainers}
    clocked: dict[str, list[Clocked]] = {name: [] for name in trainers}
    for number in range(WARM_UP + steps):
        say(f"step {number + 1} of {WARM_UP + steps}")
        names = list(trainers) if number % 2 else list(reversed(trainers))
        for name in names:
            wall, cpu = time_one(trainers[name].step, device)
            if number >= WARM_UP:
                plain[name].wall.append(wall)
                plain[name].cpu.append(cpu)
                clocked[name].append(clocked_step(trainers[name]))
    found = {name: record(clocked[name], plain[name].wall, trainer) for name, trainer in trainers.items()}
    return _result(config, found, plain)


def _result(config: Config, found: dict[str, dict[str, Any]], plain: dict[str, Times]) -> dict[str, Any]:
    own, (peer_name, peer) = found["ours"], next(one for one in found.items() if one[0] != "ours")
    experts = {name: _experts(one) for name, one in (("ours", own), (peer_name, peer))}
    share, speedup = experts[peer_name] / peer["parts_ms"], experts[peer_name] / experts["ours"]
    return {
        "model": {**config.model.model_dump(), "experts": config.moe.num_experts, "top_k": config.moe.top_k,
                  "expert_dim": config.moe.expert_dim, "tokens": config.train.batch_size * config.train.seq_len},
        "peer": peer_name,
        "ratio": plain[peer_name].minimum / plain["ours"].minimum,
        "ratio_median": plain[peer_name].median / plain["ours"].median,
        "ratio_cpu": plain[peer_name].cpu_minimum / plain["ours"].cpu_minimum,
        "experts_share": share,
        "experts_ratio": speedup,
        "amdahl_bound": amdahl(share, speedup),
        "steps": found,
    }  # fmt: skip


def _experts(found: dict[str, Any]) -> float:
    """Return the milliseconds of experts and dispatch, which a peer does in one."""
    return sum(found["parts"].get(name, {"ms": 0.0})["ms"] for name in ("experts", "dispatch"))


def _swap(model: DecoderLM, implementation: str) -> DecoderLM:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("transformers", "bench") from error
    other = deepcopy(model)
    for layer in moe_layers(other):
        layer.experts = _Swapped(layer.experts, implementation)
    return other


def _trainer(config: Config, model: DecoderLM) -> Trainer:
    rate = config.train.learning_rate
    return Trainer(
        model,
        RandomRows(config.train.batch_size, config.train.seq_len),
        optimizer=build_optimizer(model, rate),
        learning_rate=lambda _: rate / 100,
        statistics=Statistics(
            model.moe_layer_indices(),
            build_groups(config.moe),
            routers=[layer.router for layer in moe_layers(model)],
            device=next(model.parameters()).device,
        ),
    )


def _compare(trainers: dict[str, Trainer]) -> None:
    """Raise WrongPeerError unless both models have the same logits, and gradients of every parameter."""
    found: list[dict[str, Tensor]] = []
    for trainer in trainers.values():
        inputs = torch.from_numpy(trainer.batches.micro_batch(0, 0).tokens[:, :-1]).to(trainer.device)
        logits, _ = trainer.model(inputs)
        logits.float().logsumexp(-1).mean().backward()
        named = trainer.model.named_parameters()
        grads = {f"gradient of {name}": p.grad for name, p in named if p.grad is not None}
        found.append({"logits": logits.detach(), **grads})
        trainer.model.zero_grad(set_to_none=True)
    for (name, left), right in zip(found[0].items(), found[1].values(), strict=True):
        if not (error := worst_row(right.flatten()[None], left.flatten()[None])) <= 10 * TOLERANCE["fp32"]:
            raise WrongPeerError(f"the two models' {name} differs by {error:.1e} of its size: nothing was timed")
