"""Where and on what a run ran: the parts of env.json, and the device to run on."""

import os
import platform
import secrets
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

import himoe
from himoe.data import Corpus


def describe_environment(command: list[str] | None) -> dict[str, Any]:
    """Return command, time, versions and machine."""
    return {
        "command": command,
        "started": now(),
        "himoe": himoe.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "device": _device_name(),
        "git_commit": _git_commit(),
    }


def kernels(model: nn.Module, precision: str) -> list[str]:
    """Return the names of the kernels that the experts of a model run on, in alphabetical order."""
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        found = [getattr(module, "kernel", None) for module in model.modules()]
    return sorted({name for name in found if isinstance(name, str)})


def describe_data(corpus: Corpus) -> dict[str, Any]:
    """Return name, hash and sizes of the text."""
    return {
        "name": corpus.name,
        "hash": corpus.hash,
        "train_tokens": sum(stream.num_tokens for stream in corpus.train.values()),
        "train_bytes": sum(stream.num_bytes for stream in corpus.train.values()),
        "tokenizer": corpus.tokenizer.name,
        "vocab_size": corpus.tokenizer.vocab_size,
        "domains": {
            name: {"held_out_bytes": file.num_bytes, "held_out_tokens": file.num_tokens}
            for name, file in corpus.held_out.items()
        },
    }


def new_id(name: str) -> str:
    """Return what tells a run from every other: its name and eight random digits, no matter what the seed is."""
    return f"{name}-{secrets.token_hex(4)}"


def best_device() -> torch.device:
    """Return the GPU where torch has one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def now() -> str:
    """Return the time as ISO 8601 with the zone, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def peak_memory_mib() -> float | None:
    """Return the largest resident memory this process has had, None on a system that does not tell."""
    try:
        import resource  # POSIX only
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def _cores() -> int:
    """Return the cores this process may use, which is fewer than the machine has under taskset or in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device_name() -> str:
    return torch.cuda.get_device_name() if best_device().type == "cuda" else "cpu"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _git_commit() -> str | None:
    """Return the commit of himoe's own source, None when it was not run from a checkout."""
    root = Path(himoe.__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
