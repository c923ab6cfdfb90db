"""A training step by its parts, and beside it the same step without a clock in it."""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from himoe.bench.clock import time_one
from himoe.bench.laps import Laps, following
from himoe.config import Config
from himoe.data import Corpus
from himoe.errors import ConfigError
from himoe.kernels import sort_pairs
from himoe.nn import moe_layers
from himoe.train.loop import Trainer
from himoe.train.start import build_trainer

WARM_UP = 2


def trainer_of(config: Config, corpus: Corpus) -> Trainer:
    """Return the trainer of a run; raises ConfigError for compiled layers, whose parts cannot be told apart."""
    if config.train.compile:
        raise ConfigError("train.compile = true: compiled layers have no parts; add --set train.compile=false")
    return build_trainer(config, corpus, None)


def measure_step(trainer: Trainer, *, steps: int, on_step: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Train `steps` steps with the clock and as many without, in turns; return what docs/benchmarks.md describes."""
    device = trainer.device.type
    clocked: list[Clocked] = []
    plain: list[float] = []
    for _ in range(WARM_UP):
        trainer.step()
    for _ in range(steps):
        plain.append(time_one(trainer.step, device)[0])
        on_step()
        clocked.append(clocked_step(trainer))
        on_step()
    return {"steps": steps, **record(clocked, plain, trainer)}


class Clocked(NamedTuple):
    """A step with the clock in it: its seconds, and those of its parts."""

    seconds: float
    laps: Laps


def clocked_step(trainer: Trainer) -> Clocked:
    """Train one step with the clock."""
    laps = Laps(trainer.device.type)
    with following(trainer, laps):
        seconds = time_one(trainer.step, trainer.device.type)[0]
    return Clocked(seconds, laps)


def record(clocked: list[Clocked], plain: list[float], trainer: Trainer) -> dict[str, Any]:
    """Return milliseconds and shares of every part of the fastest step with the clock, and the times of all steps."""
    fastest = min(clocked, key=lambda one: one.seconds)
    parts = dict(fastest.laps.seconds)
    total = sum(parts.values())
    sorting = min(_sort_seconds(fastest.laps, trainer), parts["experts"])
    parts["dispatch"] += sorting
    parts["experts"] -= sorting
    timed = [one.seconds for one in clocked]
    return {
        "parts": {
            name: {"ms": 1e3 * seconds, "share": seconds / total} for name, seconds in parts.items() if seconds > 0
        },
        "parts_ms": 1e3 * total,
        "step_ms": {
            "with_clock": {"minimum": 1e3 * min(timed), "median": 1e3 * statistics.median(timed)},
            "without_clock": {"minimum": 1e3 * min(plain), "median": 1e3 * statistics.median(plain)},
        },
        "tokens_per_second": trainer.tokens_done / trainer.steps_done / min(plain),
    }


@torch.no_grad()
def _sort_seconds(laps: Laps, trainer: Trainer) -> float:
    """Return what sorting the pairs of a step takes, which the kernel does first; measured again by itself."""
    seconds = 0.0
    for layer in moe_layers(trainer.model):
        routing = laps.routings.get(layer.router)
        kernel = getattr(layer.experts, "kernel", None)  # pools of experts have none
        if routing is not None and isinstance(kernel, str):
            sort = (kernel, routing.expert_ids, routing.kept, routing.num_experts)
            seconds += min(time_one(lambda of=sort: sort_pairs(*of), trainer.device.type)[0] for _ in range(5))
    return seconds * trainer.batches.accumulate
