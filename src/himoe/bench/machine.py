"""What this machine is and which backend it gets: `environment` stands in every result, `doctor` explains itself."""

import os
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from himoe.bench.clock import matmul_gflops
from himoe.bench.problem import DTYPES
from himoe.errors import ConfigError
from himoe.kernels import BACKENDS, backend_status, choose_backend, native_build
from himoe.train.environment import describe_environment

PACKAGES = ("numpy", "triton", "transformers", "st-moe-pytorch", "liger-kernel", "scattermoe", "sonic-moe")
# Sizes (T·K/E rows, D, F, E) that a choice may depend on.
SAMPLES = {"wide experts": (1024, 512, 1024, 8), "narrow experts": (1024, 256, 64, 64), "D = 129": (1024, 129, 64, 8)}


def environment(device: str) -> dict[str, Any]:
    """Return machine, versions and measured product rates; what results are quoted with."""
    known = describe_environment(None)
    names = ("himoe", "git_commit", "python", "torch", "platform", "cpu", "cores", "threads")
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        **{name: known[name] for name in names},
        "device": gpu or "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "blas": _blas(),
        "packages": versions(),
        "matmul_gflops": {name: matmul_gflops(dtype, device) for name, dtype in DTYPES.items()},
    }


def versions() -> dict[str, str | None]:
    """Return the installed versions of what backends and peers come from, None for what is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def diagnosis() -> dict[str, Any]:
    """Return which backend `auto` takes for which device, dtype and shape, and what it is made of."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    choices = [
        {"device": device, "dtype": dtype, "shape": name, **_choices(device, dtype, sizes)}
        for device in devices
        for dtype in DTYPES
        for name, sizes in SAMPLES.items()
    ]
    return {
        "backends": backend_status(),
        "choices": choices,
        "thread_settings": {
            "in_operators": torch.get_num_threads(),
            "between_operators": torch.get_num_interop_threads(),
            **{name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_SPINCOUNT")},
        },
        "compiler": compiler(),
        "cuda": _cuda(),
        **environment("cpu"),
    }


def _choices(device: str, dtype: str, sizes: tuple[int, int, int, int]) -> dict[str, Any]:
    """Return what `auto` takes, and all that could be taken; nothing is computed."""
    tokens, dim, hidden, experts = sizes
    x = torch.empty(tokens, dim, dtype=DTYPES[dtype], device=device)
    up, down = x.new_empty(experts, 2 * hidden, dim), x.new_empty(experts, dim, hidden)

    def takes(backend: str) -> bool:
        try:
            return choose_backend(backend, x, up, down) == backend
        except ConfigError:  # one that needs a package says so
            return False

    return {"backend": choose_backend("auto", x, up, down), "possible": [name for name in BACKENDS if takes(name)]}


def compiler() -> dict[str, str | None]:
    """Return path and first line of `--version` of the C++ compiler that the kernel is built with."""
    try:
        path = native_build.find_compiler()
    except native_build.BuildError:
        return {"name": os.environ.get("CXX") or "c++", "path": None, "version": None}
    name = os.path.basename(path)  # noqa: PTH119
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        answer = ""
    return {"name": name, "path": path, "version": answer.partition("\n")[0] or None}


def _blas() -> str:
    found = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return found[1] if found else "unknown"


def _cuda() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return {"name": torch.cuda.get_device_name(), "capability": f"sm_{major}{minor}", "cuda": torch.version.cuda}
