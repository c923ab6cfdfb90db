"""One run folder as a row of the table `runs`, and its lines of the table `curves` (docs/sweep.md has every column)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from himoe.config import Config
from himoe.errors import HimoeError, RunFolderError
from himoe.plan import flops, parameters, shape_of
from himoe.run_folder import read_json, read_log
from himoe.sweep.identity import flat_config
from himoe.sweep.status import DONE, ERROR, FAILED, STOPPED, status_of

WINDOW = 50
"""Steps that balance is measured over at the end of a run, as in its records."""


@dataclass(frozen=True)
class Facts:
    """What one run folder says.

    Attributes:
        row: columns that every run has.
        keys: the configuration by dotted keys, of which the table shows those that differ between runs.
        curve: lines of the table `curves`.
    """

    row: dict[str, Any]
    keys: dict[str, Any]
    curve: list[dict[str, Any]]


def read_facts(folder: Path) -> Facts | None:
    """Return what the run folder says, None where no run stands or its config.json cannot be read."""
    try:
        tree = read_json(folder / "config.json")
        config = Config.model_validate(tree)
    except HimoeError:
        return None
    env, summary, failure = (_read(folder / name) for name in ("env.json", "summary.json", ERROR))
    metrics = read_log(folder / "metrics.jsonl")
    status = status_of(folder)
    ended = status in (DONE, STOPPED)
    last = summary if ended else next((line for line in reversed(metrics) if line.get("kind") == "train"), {})
    tokens = int(last.get("tokens") or 0)
    row = {
        "run": folder.name,
        "status": status,
        "error": str(failure.get("error")) if status == FAILED else None,
        "recipe": config.name,
        "seed": config.seed,
        **_router(config),
        **_sizes(config, env, tokens),
        "tokens": tokens,
        "steps": int(last.get("step") or 0),
        "learning_rate": config.train.learning_rate,
        "cross_entropy": _number(summary.get("loss")) if ended else None,
        "bits_per_byte": _number(summary.get("bits_per_byte")) if ended else None,
        "bits_per_byte_by_domain": _by_domain(summary) if ended else None,
        **_balance(config, summary if ended else {}, folder),
        "wall_seconds": _number(last.get("seconds")),
        "tokens_per_second": _number(last.get("tokens_per_second")),
        "started": _time(env.get("started")),
        "commit": env.get("git_commit"),
        "version": env.get("himoe"),
        "kernels": ", ".join(env.get("kernels") or []) if env else None,
    }
    return Facts(row, flat_config(config.model_dump(mode="json")), _curve(folder.name, metrics))


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except RunFolderError:
        return {}


def _router(config: Config) -> dict[str, Any]:
    moe, dense = config.moe, not config.moe_layer_indices
    balancers = ", ".join(one.name for one in moe.balancers)
    found = {"preset": moe.preset, "selector": moe.selector, "balancers": balancers or None}
    return dict.fromkeys(found) if dense else found


def _sizes(config: Config, env: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """Return sizes, parameters and FLOPs, as himoe.plan counts them; what it cannot count as the run itself did."""
    counted = env.get("parameters") or {}
    found: dict[str, Any] = {
        "total_parameters": counted.get("total"),
        "active_parameters": counted.get("active"),
        "active_without_embeddings": counted.get("active_without_embeddings"),
        "training_flops": None,
    }
    experts = None
    try:
        shape = shape_of(config, (env.get("data") or {}).get("vocab_size"))
    except HimoeError:  # experts of somebody's own, or a tokenizer that has not been opened yet
        shape = None
    if shape is not None:
        counts, experts = parameters(shape), shape.experts
        found["total_parameters"], found["active_parameters"] = counts.total, counts.active
        found["active_without_embeddings"] = counts.active_without_embeddings
        found["training_flops"] = tokens * flops(shape, config.train.seq_len, config.train.recompute).total
    moe, dense = config.moe, not config.moe_layer_indices
    one_size = moe.pools is None and not dense
    top_k = moe.top_k if experts is None else experts.mean_top_k
    return {
        "num_experts": None if dense else moe.num_experts,
        "top_k": None if dense else top_k,
        "expert_dim": moe.expert_dim if one_size else None,
        "dim": config.model.dim,
        "num_layers": config.model.num_layers,
        "granularity": moe.expert_dim / (4 * config.model.dim) if one_size else None,
        "sparsity": None if dense else moe.num_experts / top_k,
        **found,
    }


def _by_domain(summary: Mapping[str, Any]) -> dict[str, float] | None:
    found = {name: _number(one.get("bits_per_byte")) for name, one in (summary.get("domains") or {}).items()}
    return {name: bits for name, bits in found.items() if bits is not None} or None


def _balance(config: Config, summary: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return MaxVio and CV, means over layers: of experts as summary.json has them, of groups from load.jsonl.

    Groups' numbers are of the pairs that were kept, those of experts of the pairs as selected.
    """
    layers: Sequence[Mapping[str, Any]] = summary.get("layers") or []
    levels = {"expert": (_mean(layers, "cv_window"), _mean(layers, "max_vio_window"))}
    if layers and config.moe.num_groups > 1:
        levels["group"] = _of_groups(config, read_log(folder / "load.jsonl"))
    cv, max_vio = ({level: both[i] for level, both in levels.items() if both[i] is not None} for i in (0, 1))
    dead = [len(layer.get("dead_experts") or []) for layer in layers]
    return {
        "cv": levels["expert"][0],
        "max_vio": levels["expert"][1],
        "cv_by_level": cv or None,
        "max_vio_by_level": max_vio or None,
        "dead_experts": fmean(dead) if dead else None,
    }


def _mean(layers: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [value for layer in layers if (value := _number(layer.get(key))) is not None]
    return fmean(values) if values else None


def _of_groups(config: Config, lines: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """Return CV and MaxVio of the groups over the last steps, at least those of the last line."""
    lines = [line for line in lines if isinstance(line.get("layers"), list)]
    recent = [line for line in lines if line["step"] > lines[-1]["step"] - WINDOW]
    number = config.moe.num_experts
    size = number // config.moe.num_groups
    groups = config.moe.groups or [[*range(first, first + size)] for first in range(0, number, size)]
    found = []
    for layer in range(len(recent[-1]["layers"]) if recent else 0):
        load = [sum(values) for values in zip(*(line["layers"][layer]["load"] for line in recent), strict=True)]
        if len(load) != number:  # a damaged line
            continue
        # by expert of the group, since groups may be unequal
        fair = [sum(load[expert] for expert in group) / len(group) for group in groups]
        if mean := fmean(fair):
            found.append((pstdev(fair) / mean, max(fair) / mean - 1))
    return (fmean(cv for cv, _ in found), fmean(vio for _, vio in found)) if found else (None, None)


def _curve(run: str, metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a line for every step that has a loss, of training, of validation, or both."""
    steps: dict[int, dict[str, Any]] = {}
    for line in metrics:
        name = {"train": "train_cross_entropy", "eval": "cross_entropy"}.get(str(line.get("kind")))
        if name is not None:
            empty = {"run": run, "step": line["step"], "tokens": 0, "cross_entropy": None, "train_cross_entropy": None}
            one = steps.setdefault(line["step"], empty)
            one["tokens"], one[name] = int(line.get("tokens") or 0), _number(line.get("loss"))
    return [steps[step] for step in sorted(steps)]


def _time(text: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
