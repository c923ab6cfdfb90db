"""Tables of a sweep that was never run, from a law that is known: to test the analysis with, and to try it out.

The columns are those of a real sweep's tables; losses are the law's, times noise that all settings of a seed share and
noise that each run has of its own.
"""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

VOCABULARY = 4096
NEVER = datetime.datetime(2026, 1, 1)


@dataclass(frozen=True)
class Truth:
    """A law whose best s and g are known; its curvatures are those of log loss where the rest is constant.

    Attributes:
        offset: E.
        size: the part that falls with active parameters, at 1M of them.
        alpha: its exponent.
        data: the part that falls with tokens, at 10M of them.
        beta: its exponent.
        granularity: the best g at 1M active parameters.
        drift: by which power of the active parameters the best g falls.
        sparsity: the best s.
        bend_g: κ.
        bend_s: δ.
        skew: a cubic part in ln g that the fitted law lacks.
    """

    offset: float = 1.2
    size: float = 2.0
    alpha: float = 0.12
    data: float = 0.5
    beta: float = 0.3
    granularity: float = 1 / 8
    drift: float = 0.15
    sparsity: float = 24.0
    bend_g: float = 0.02
    bend_s: float = 0.012
    skew: float = 0.0

    def best_granularity(self, active: float) -> float:
        """Return the best g for active parameters without embeddings."""
        return self.granularity * (active / 1e6) ** -self.drift

    def loss(self, active: float, sparsity: float, granularity: float, tokens: float) -> float:
        """Return the loss in nats per token."""
        x, y = (math.log(granularity / self.best_granularity(active)), math.log(sparsity / self.sparsity))
        bend = self.bend_g * (x**2 + self.skew * x**3) / 2 + self.bend_s * y**2 / 2
        size = self.size * (active / 1e6) ** -self.alpha
        return self.offset + size * math.exp(bend) + self.data * (tokens / 1e7) ** -self.beta


def rows(
    truth: Truth | None = None,
    *,
    scales: Sequence[tuple[int, int]] = ((96, 3),),
    sparsities: Sequence[int] = (4, 16, 64),
    slices: Sequence[int] = (1, 4, 16),
    tokens: Sequence[int] = (10_000_000,),
    seeds: int = 3,
    own: float = 0.003,
    common: float = 0.005,
    draw: int = 0,
) -> list[dict[str, Any]]:
    """Return the rows of `runs`: every scale (D, layers), sparsity, number of slices K = 1/g, tokens and seed.

    Args:
        truth: the law.
        scales: width and layers.
        sparsities: s.
        slices: K, with g = 1/K.
        tokens: numbers of tokens.
        seeds: runs of each setting.
        own: standard deviation of a run's own noise, in log loss.
        common: that of the noise all runs of a seed share.
        draw: seed of the noise.
    """
    truth, noise = truth or Truth(), np.random.default_rng(draw)
    shared = common * noise.standard_normal(seeds)
    found = []
    for (dim, layers), s, k, d, seed in itertools.product(scales, sparsities, slices, tokens, range(seeds)):
        plain = layers * 16 * dim**2
        exact = truth.loss(plain, s, 1 / k, d)
        loss = exact * math.exp(shared[seed] + own * noise.standard_normal())
        found.append(_row(dim, layers, s, k, d, seed, loss))
    return found


def _row(dim: int, layers: int, s: int, k: int, tokens: int, seed: int, loss: float) -> dict[str, Any]:
    experts, embeddings = s * k, VOCABULARY * dim
    router = experts * dim * layers
    active = layers * 16 * dim**2 + router
    total = layers * (4 * dim**2 + 12 * dim**2 * s) + router
    steps = tokens // 8192
    cv = 0.2 + 0.03 * math.log(experts)
    return {
        "run": f"{dim:03}{experts:05}{k:03}{tokens:012}{seed:02}",
        "name": f"num_experts {experts} · top_k {k} · expert_dim {4 * dim // k} · seed {seed}",
        "status": "done",
        "error": None,
        "recipe": "lm_small_switch",
        "seed": seed,
        "model.dim": dim,
        "model.num_layers": layers,
        "model.num_heads": dim // 32,
        "model.num_kv_heads": dim // 32,
        "moe.num_experts": experts,
        "moe.top_k": k,
        "moe.expert_dim": 4 * dim // k,
        "train.steps": steps,
        "preset": "switch",
        "selector": "top_k",
        "balancers": "switch",
        "num_experts": experts,
        "top_k": k,
        "expert_dim": 4 * dim // k,
        "dim": dim,
        "num_layers": layers,
        "granularity": 1 / k,
        "sparsity": float(s),
        "total_parameters": total + embeddings,
        "active_parameters": active + embeddings,
        "active_without_embeddings": active,
        "tokens": tokens,
        "training_flops": 6.0 * (active + embeddings) * tokens,
        "steps": steps,
        "learning_rate": 3e-3,
        "cross_entropy": loss,
        "bits_per_byte": loss / math.log(2) / 3.6,
        "cv": cv,
        "max_vio": 3 * cv,
        "wall_seconds": tokens / 20000,
        "tokens_per_second": 20000.0,
        "started": NEVER,
    }


def curve(row: dict[str, Any], evaluations: int = 8) -> list[dict[str, Any]]:
    """Return the lines of `curves` that end in a run's loss."""
    lines = []
    for i in range(1, evaluations + 1):
        share = i / evaluations
        loss = row["cross_entropy"] + 0.6 * (share**-0.5 - 1)
        at = {"step": round(row["steps"] * share), "tokens": round(row["tokens"] * share)}
        lines.append({"run": row["run"], **at, "cross_entropy": loss, "train_cross_entropy": loss})
    return lines


def tables(some: Sequence[dict[str, Any]]) -> tuple[pa.Table, pa.Table]:
    """Return rows as the tables `runs` and `curves`."""
    import pyarrow as pa

    return pa.Table.from_pylist(list(some)), pa.Table.from_pylist([line for row in some for line in curve(row)])
