"""Backend `native`: the expert MLP in C++ and OpenMP (`csrc/`), compiled on first use; fp32 and bf16 on a CPU.

Without a compiler or with `HIMOE_NATIVE=0`, `loop` runs instead and `status` says why. Products are the kernel's own,
in fp32; where torch has fast bf16 products these are called for bf16, through a second library that is compiled with
the first bf16 layer.
"""

import ctypes
import functools
import itertools
import os
import threading
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from himoe.errors import ConfigError, KernelError
from himoe.functional.dispatch import SortedPairs, sort_by_expert
from himoe.functional.tracing import constant, is_recorded
from himoe.kernels import caching_allocator, loop, native_build
from himoe.kernels.activation import ACTIVATIONS
from himoe.kernels.libtorch import symbol

SIZES = ("top_k", "width", "rows_up", "units", "experts", "tokens", "mode", "activation", "threads")
NEEDS = ("need_x", "need_weights", "need_up", "need_down")
POINTERS = (
    *("pair_of_row", "row_of_pair", "offsets", "weights", "x", "grad", "up", "down", "hidden", "out", "y"),
    *("unit", "d_hidden", "d_weight_of_row", "d_weights", "d_up", "d_down", "scratch"),
)
MODES, HALF = {torch.float32: 0, torch.bfloat16: 1}, 2  # `Mode` of csrc/problem.h
FUNCTIONS = ("half_gemm", "set_blas_threads", "omp_threads", "set_omp_threads")
TORCH_THREADS = "_ZN2at15get_num_threadsEv"  # at::get_num_threads()


class _Problem(ctypes.Structure):
    """`Problem` of csrc/problem.h."""

    _fields_ = [(n, ctypes.c_int64) for n in (*SIZES, *NEEDS, "group_rows")] + [
        (n, ctypes.c_void_p) for n in (*POINTERS, *FUNCTIONS)
    ]


class Status(NamedTuple):
    """Whether the kernel can run, and why or why not, for people."""

    available: bool
    reason: str


class _Kernel(NamedTuple):
    library: ctypes.CDLL
    path: Path


_locks = [threading.Lock()]  # one; a forked child gets another, as nobody would open one that was held
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _locks.__setitem__(0, threading.Lock()))
_PROCESS = os.getpid()


@functools.cache
def _half_gemm() -> int | str:
    """Return the address of torch's bf16 product, or why there is none."""
    try:
        library = ctypes.CDLL(str(native_build.library_path("half_gemm", native_build.WITH_TORCH)))
    except (native_build.BuildError, OSError) as error:
        return str(error)
    return ctypes.cast(library.himoe_half_gemm, ctypes.c_void_p).value or "himoe_half_gemm is missing"


@functools.cache
def _load() -> _Kernel | str:
    """Return the kernel, or why there is none."""
    if os.environ.get("HIMOE_NATIVE", "1") == "0":
        return "switched off by HIMOE_NATIVE=0"
    try:
        path = native_build.library_path("expert_mlp")
        library = ctypes.CDLL(str(path))
    except (native_build.BuildError, OSError) as error:
        return str(error)
    for function in (library.himoe_scratch, library.himoe_run):
        function.argtypes = [ctypes.POINTER(_Problem), ctypes.c_int64]
    library.himoe_sort.argtypes = [ctypes.c_int64] * 2 + [ctypes.c_void_p] * 5
    for function in (library.himoe_sort, library.himoe_scratch, library.himoe_run):
        function.restype = ctypes.c_int64
    return _Kernel(library, path)


def _kernel() -> _Kernel | str:
    with _locks[0]:  # or two threads would build at once
        return _load()


def status(dtype: torch.dtype = torch.float32) -> Status:
    """Return whether the kernel can run on this machine in fp32 or bf16; a process's first call may compile it."""
    if dtype not in MODES:
        return Status(False, f"{dtype}: only {' and '.join(str(d) for d in MODES)}")
    kernel = _kernel()
    if isinstance(kernel, str):
        return Status(False, kernel)
    if _mode(dtype) == HALF:
        with _locks[0]:
            half_gemm = _half_gemm()
        if isinstance(half_gemm, str):
            return Status(False, half_gemm)
    return Status(True, f"compiled, {kernel.path}")


def _mode(dtype: torch.dtype) -> int:
    return HALF if dtype == torch.bfloat16 and loop.multiplies_bf16() else MODES[dtype]


@constant
def available(dtype: torch.dtype = torch.float32) -> bool:
    """Return whether the kernel can run in this dtype."""
    return status(dtype).available


def unavailable() -> str | None:
    """Return why the kernel cannot run here in fp32, None where it can."""
    found = status()
    return None if found.available else found.reason


def supports(x: Tensor, *projections: Tensor) -> bool:
    """Return whether the kernel takes this dtype and device, and can run."""
    alike = all(p.dtype == x.dtype and p.device == x.device for p in projections)
    return x.device.type == "cpu" and x.dtype in MODES and alike and available(x.dtype)


def _threads() -> int:
    """Return torch's number of threads; a forked child has none of its parent's, and would wait for them."""
    return torch.get_num_threads() if os.getpid() == _PROCESS else 1


def _group_rows(rows: SortedPairs) -> tuple[int, int]:
    """Return the rows of a group of experts, and of the working space for two groups.

    Backward keeps what the weight gradients need of an expert only until they are done. A group has at least the
    largest expert, and enough rows for every thread; where two groups would be nearly all, all is one group.
    """
    ends = [0, *rows.offsets.tolist()]
    largest = max(end - start for start, end in itertools.pairwise(ends))
    group = max(largest, ends[-1] * _threads() // 64)
    return (group, 2 * group) if 2 * group < ends[-1] else (ends[-1], ends[-1])


def _run(
    backward: bool,
    weights: Tensor,
    rows: SortedPairs,
    activation: str,
    needs: tuple[bool, ...],
    group_rows=0,
    **tensors,
) -> None:
    """Fill a `_Problem` and run it. Tensors are contiguous; None is a null pointer."""
    kernel = _kernel()
    assert not isinstance(kernel, str)
    up, down = tensors["up"], tensors["down"]
    experts, width, units = down.shape
    problem = _Problem(
        top_k=weights.shape[1], width=width, rows_up=up.shape[1], units=units, experts=experts, tokens=weights.shape[0],
        mode=_mode(up.dtype), activation=list(ACTIVATIONS).index(activation),
        threads=_threads(), **dict(zip(NEEDS, needs, strict=True)),
    )  # fmt: skip
    problem.group_rows = group_rows
    tensors |= {"weights": weights.detach().float(), **rows._asdict()}
    if problem.mode == HALF:
        problem.half_gemm, problem.set_blas_threads = _half_gemm(), symbol("MKL_Set_Num_Threads_Local")
        problem.omp_threads, problem.set_omp_threads = symbol(TORCH_THREADS), symbol("omp_set_num_threads")
    for name, tensor in tensors.items():
        setattr(problem, name, None if tensor is None else tensor.data_ptr())
    floats = kernel.library.himoe_scratch(problem, backward)
    if floats < 0:
        raise _failure(up, down, rows)
    scratch = caching_allocator.empty(problem.threads * floats, like=torch.empty(0, dtype=torch.float32, device="cpu"))
    problem.scratch = scratch.data_ptr()
    if kernel.library.himoe_run(problem, backward):
        raise _failure(up, down, rows)


def _failure(up: Tensor, down: Tensor, rows: SortedPairs) -> KernelError:
    return KernelError(
        f"expert_mlp: backend native ran out of memory or failed with up_proj {tuple(up.shape)}, down_proj "
        f"{tuple(down.shape)} and {rows.pair_of_row.numel()} pairs; give it fewer tokens at a time, or take loop"
    )


def sort(expert_ids: Tensor, kept: Tensor, num_experts: int) -> SortedPairs:
    """Do as `sort_by_expert`: by counting in C++, where nobody records it and these are what it takes, else just so."""
    plain = not is_recorded(expert_ids, kept) and expert_ids.shape == kept.shape
    types = (expert_ids.dtype, kept.dtype, expert_ids.device.type, kept.device.type)
    kernel = _kernel() if plain and types == (torch.int64, torch.bool, "cpu", "cpu") else None
    if not isinstance(kernel, _Kernel):
        return sort_by_expert(expert_ids, kept, num_experts)
    expert_ids, kept, num_pairs = expert_ids.contiguous(), kept.contiguous(), expert_ids.numel()
    pair_of_row, row_of_pair = expert_ids.new_empty(num_pairs), expert_ids.new_empty(num_pairs)
    rows = SortedPairs(pair_of_row, row_of_pair, expert_ids.new_empty(num_experts, dtype=torch.int32))
    pointers = (tensor.data_ptr() for tensor in (expert_ids, kept, *rows))
    code = kernel.library.himoe_sort(num_pairs, num_experts, *pointers)
    if code > 0:
        raise ConfigError(f"expert_mlp: some of expert_ids are not in 0 … {num_experts - 1}")
    if code < 0:
        raise KernelError(f"expert_mlp: backend native ran out of memory with {num_pairs} pairs")
    return rows


def forward(
    x: Tensor, weights: Tensor, rows: SortedPairs, up_proj: Tensor, down_proj: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Return y (T, D) and the up projection's output (T·K, H), rows in expert order."""
    if not supports(x, up_proj, down_proj):  # a graph exported on a machine that has the kernel
        return loop.forward(x, weights, rows, up_proj, down_proj, activation)
    num_pairs = rows.pair_of_row.numel()
    y = caching_allocator.empty(*x.shape, like=x)
    hidden = caching_allocator.empty(num_pairs, up_proj.shape[1], like=x)
    out = caching_allocator.empty(num_pairs, x.shape[1], like=x)
    needs = (False,) * 4
    _run(False, weights, rows, activation, needs, x=x, up=up_proj, down=down_proj, hidden=hidden, out=out, y=y)
    return y, hidden


def backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    hidden: Tensor,
    rows: SortedPairs,
    up_proj: Tensor,
    down_proj: Tensor,
    activation: str,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weights, up_proj and down_proj, None where not needed."""
    if not supports(x, up_proj, down_proj):
        return loop.backward(grad, x, weights, hidden, rows, up_proj, down_proj, activation, needs)
    if not any(needs):
        return None, None, None, None
    need_x, need_weights, need_up, need_down = needs
    num_pairs, units = rows.pair_of_row.numel(), down_proj.shape[2]
    group_rows, working_rows = _group_rows(rows)

    def space(needed: bool, *shape: int, like: Tensor = x) -> Tensor | None:
        return caching_allocator.empty(*shape, like=like) if needed else None

    per_pair = weights.new_empty(0, dtype=torch.float32)
    d_x = space(need_x, *x.shape)
    d_weights = space(need_weights, *weights.shape, like=per_pair)
    d_up, d_down = space(need_up, *up_proj.shape), space(need_down, *down_proj.shape)
    _run(
        True, weights, rows, activation, needs, group_rows, x=x, grad=grad, hidden=hidden, up=up_proj,
        down=down_proj, y=d_x, d_weights=d_weights, d_up=d_up, d_down=d_down, out=space(need_x, num_pairs, x.shape[1]),
        unit=space(need_down, working_rows, units), d_hidden=space(need_up, working_rows, hidden.shape[1]),
        d_weight_of_row=space(need_weights, num_pairs, like=per_pair),
    )  # fmt: skip
    return d_x, None if d_weights is None else d_weights.to(weights.dtype), d_up, d_down
