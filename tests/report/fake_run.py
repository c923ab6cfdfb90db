"""A realistic run folder without a training: 4 layers, 16 experts in 4 groups, 3 domains, 300 steps."""

import json
import math
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

DOMAINS = ("code", "tests", "prose")
ROLES = {"embedding": 0.4, "attention": 0.3, "router": 0.02, "experts": 0.5, "norm": 0.05}
NEWER = ("data_wait", "norms", "noise_scale", "by_context", "by_length", "effective_experts", "dead_experts", "best")
"""Keys that folders of the first version lack."""
EXPERTS, GROUPS, LAYERS = 16, 4, 4
TOKENS_PER_STEP = 4096


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def edit(path: Path, change: Callable[[dict], object]) -> None:
    """Change a JSON document in place."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def as_first_version(path: Path) -> Path:
    """Take away what the run folders of the first version did not have."""
    for name in ("metrics.jsonl", "load.jsonl"):
        lines = [line for line in read_lines(path / name) if line.get("kind") != "alarm"]
        write_lines(path / name, _without(lines))
    edit(path / "summary.json", lambda summary: (summary.pop("best"), summary.update(_without(summary))))
    return path


def _without(value):
    if isinstance(value, list):
        return [_without(one) for one in value]
    if isinstance(value, dict):
        return {key: _without(one) for key, one in value.items() if key not in NEWER}
    return value


def fake_run(path: Path, *, steps: int = 300, log_every: int = 10, domains: tuple[str, ...] = DOMAINS) -> Path:
    """Write a run folder as docs/run-folder.md describes it: loads start uneven and settle, all with noise."""
    noise = random.Random(0)
    path.mkdir(parents=True, exist_ok=True)
    log_every = min(log_every, steps)
    skew = [[math.exp(noise.gauss(0, 0.9)) for _ in range(EXPERTS)] for _ in range(LAYERS)]
    metrics, loads = [], []
    for step in range(log_every, steps + 1, log_every):
        if step == 2 * log_every:
            text = (
                f"layer 2: expert 5 of 16 had under 1 % of a fair share, at step {step}: raise the weight of the loss"
            )
            metrics.append(alarm(step, "dead_experts", 2, text))
        age = math.exp(-step / (steps / 6))
        loads.append({"step": step, "layers": [_layer(i, skew[i], age, noise, log_every) for i in range(LAYERS)]})
        metrics.append(_train_line(step, steps, loads[-1]["layers"], noise))
        if step % (5 * log_every) == 0 or step == steps:
            metrics.append(_eval_line(step, steps, domains))
    baselines = {name: {"unigram": 4.6 + 0.1 * i, "bigram": 3.58 + 0.13 * i} for i, name in enumerate(domains)}
    write_lines(path / "metrics.jsonl", metrics)
    write_lines(path / "load.jsonl", loads)
    _write_heads(path, domains, baselines)
    layers = [{key: value for key, value in layer.items() if key != "load"} for layer in loads[-1]["layers"]]
    _write_summary(path, metrics, layers, baselines)
    return path


def _layer(index: int, skew: list[float], age: float, noise: random.Random, log_every: int) -> dict:
    shares = [1 + (value - 1) * age + noise.gauss(0, 0.05) for value in skew]
    pairs = TOKENS_PER_STEP * 4 * log_every
    load = [max(0, round(pairs * share / sum(shares))) for share in shares]
    fair = sum(load) / EXPERTS
    vio = max(load) / fair - 1
    return {
        "layer": index,
        "load": load,
        "experts_per_token": 4.0,
        "truncated_mass": 0.0,
        "drop_rate": 0.0,
        "max_vio_batch": vio + 0.12 + abs(noise.gauss(0, 0.03)),
        "max_vio_window": vio,
        "cv_window": math.sqrt(sum((n / fair - 1) ** 2 for n in load) / EXPERTS),
        "effective_experts": EXPERTS - 4 * age,
        "dead_experts": [expert for expert, count in enumerate(load) if count < 0.01 * fair],
        "group_mass": 0.28 + 0.12 * age + 0.01 * index + noise.gauss(0, 0.004),
        "concentration": 0.3 + (0.4 - 0.04 * index) * (1 - age) + noise.gauss(0, 0.008),
    }


def _train_line(step: int, steps: int, layers: list[dict], noise: random.Random) -> dict:
    return {
        "kind": "train",
        "step": step,
        "tokens": step * TOKENS_PER_STEP,
        "seconds": step * 0.6,
        "loss": 3.1 + 5.2 * math.exp(-step / (steps / 5)) + noise.gauss(0, 0.06),
        "aux": {"switch": 0.041 + noise.gauss(0, 0.0005), "intra": -0.01 - 0.015 * step / steps, "inter": 0.013},
        "lr": 3e-3 * min(1, step / (0.1 * steps)) * (0.55 + 0.45 * math.cos(math.pi * step / steps)),
        "grad_norm": 0.6 + 2 * math.exp(-step / (steps / 10)) + abs(noise.gauss(0, 0.1)),
        "norms": {role: {"grad": size, "weight": 40 * size + step / steps} for role, size in ROLES.items()},
        "noise_scale": 20 + 60 * step / steps if step > steps / 10 else None,
        "tokens_per_second": 7100 + noise.gauss(0, 150),
        "data_wait": 0.002 + abs(noise.gauss(0, 0.0005)),
        "max_vio": max(layer["max_vio_window"] for layer in layers),
    }


def _eval_line(step: int, steps: int, domains: tuple[str, ...]) -> dict:
    scores, last = {}, step == steps
    for i, name in enumerate(domains):
        bits = 1.95 + 0.17 * i + 2.6 * math.exp(-step / (steps / 5))
        loss = bits * 1.62
        whole = 300_000 + 7000 * i
        scores[name] = {
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": bits,
            "tokens": 120_000 if last else 16_384,
            "bytes": whole if last else 41_000,
        }
    bits = sum(score["bits_per_byte"] for score in scores.values()) / len(scores)
    line = {"kind": "eval", "step": step, "tokens": step * TOKENS_PER_STEP, "seconds": step * 0.6}
    buckets = {"by_context": _buckets(bits, 3), "by_length": _buckets(bits, 6)}
    return {**line, "domains": scores, "bits_per_byte": bits, "loss": bits * 1.62, **buckets}


def _buckets(bits: float, count: int) -> list[dict]:
    limits = [-1, *(16 * 4**i for i in range(count))]
    return [
        {
            "from": low + 1,
            "to": high,
            "loss": bits * 1.62,
            "bits_per_byte": bits - 0.1 * i,
            "tokens": 900,
            "bytes": 2700,
        }
        for i, (low, high) in enumerate(pairwise(limits))
    ]


def alarm(step: int, kind: str, layer: int | None, text: str) -> dict:
    """Return an alarm line."""
    line = {"kind": "alarm", "step": step, "tokens": step * TOKENS_PER_STEP, "seconds": step * 0.6}
    return {**line, "alarm": kind, "layer": layer, "text": text}


def _write_heads(path: Path, domains: tuple[str, ...], baselines: dict) -> None:
    moe = {"num_experts": EXPERTS, "num_groups": GROUPS, "top_k": 4, "preset": "hi_moe", "options": {}}
    train = {"steps": 300, "batch_size": 16, "seq_len": 256, "learning_rate": 3e-3, "log_every": 10}
    config = {
        "name": "lm_demo",
        "seed": 0,
        "data": {"eval_tokens": 16_384},
        "model": {"dim": 128, "num_layers": LAYERS},
        "moe": moe,
        "train": train,
    }
    (path / "config.json").write_text(json.dumps(config))
    sizes = {name: {"held_out_bytes": 300_000 + 7000 * i, "held_out_tokens": 120_000} for i, name in enumerate(domains)}
    data = {
        "name": "embedded",
        "hash": "5f0c" * 16,
        "train_tokens": 4_100_000,
        "train_bytes": 11_000_000,
        "tokenizer": "bpe",
        "vocab_size": 4096,
        "domains": sizes,
    }
    env = {
        "id": "lm_demo-3fa92c1b",
        "command": ["himoe", "train", "lm_demo", "--set", "train.steps=300"],
        "started": "2026-01-30T12:00:00+00:00",
        "himoe": "0.1.0",
        "python": "3.11.9",
        "torch": "2.13.0",
        "platform": "Linux x86_64",
        "cpu": "Some CPU @ 2.5 GHz",
        "cores": 2,
        "threads": 2,
        "device": "cpu",
        "git_commit": None,
        "data": data,
        "parameters": _parameters(),
        "baselines": baselines,
    }
    (path / "env.json").write_text(json.dumps(env))


def _parameters() -> dict:
    active = {"active_without_input_embedding": 1_050_000, "active_without_embeddings": 525_000}
    return {"total": 3_540_000, "active": 1_570_000, **active}


def _write_summary(path: Path, metrics: list[dict], layers: list[dict], baselines: dict) -> None:
    last = [line for line in metrics if line["kind"] == "eval"][-1]
    summary = {
        "status": "finished",
        **{key: last[key] for key in ("step", "tokens", "seconds", "loss", "bits_per_byte")},
        "tokens_per_second": 7123.4,
        "domains": {name: {**score, **baselines[name]} for name, score in last["domains"].items()},
        "layers": layers,
        "max_vio_window": max(layer["max_vio_window"] for layer in layers),
        "cv_window": max(layer["cv_window"] for layer in layers),
        "best": {"step": last["step"] // 2, "bits_per_byte": 1.875},
        "parameters": _parameters(),
        "peak_memory_mib": 812.5,
    }
    (path / "summary.json").write_text(json.dumps(summary))
