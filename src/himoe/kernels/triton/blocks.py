"""Block sizes of the kernels: measured ones from `tuned.json` for their shape class, else what fits the chip by design.

A shape class is (product, D, F, rows per expert rounded up to 32, 64, 128 …, dtype, compute capability). Nothing is
searched when a layer runs; `python -m himoe.kernels.triton.tune` searches on a GPU and writes the table.
Without an entry there, the defaults below fit registers and shared memory: 227 KiB a block on capability 9.0 and 10.0,
99 KiB on 8.6, 8.9 and 12.0, which are the least.
"""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton

TUNED_FILE = Path(__file__).with_name("tuned.json")
PRODUCTS = ("up", "rows", "hidden_gradient", "weight_gradient")
INTERPRETER = (0, 0)
"""Stands for a compute capability where kernels run on the CPU."""


class Blocks(NamedTuple):
    """Sizes of a program: M rows of a tile, N columns, STEP of the summed dimension, GROUP tiles that share columns."""

    M: int
    N: int
    STEP: int
    GROUP: int
    num_warps: int
    num_stages: int


class ShapeClass(NamedTuple):
    """What block sizes depend on; `rows` is an upper class of the mean rows per expert."""

    dim: int
    hidden_dim: int
    rows: int
    dtype: str
    capability: tuple[int, int]

    def key(self, product: str) -> str:
        """Return the class as a key of the table."""
        chip = "sm" + "".join(map(str, self.capability))
        return f"{product} D{self.dim} F{self.hidden_dim} rows{self.rows} {self.dtype} {chip}"


def shape_class(
    dim: int, hidden_dim: int, pairs: int, num_experts: int, dtype: torch.dtype, device: torch.device
) -> ShapeClass:
    """Return the class of a call; `pairs` counts kept and unkept ones, since the host knows no other number."""
    mean = -(-pairs // num_experts)
    rows = min(max(32, 1 << (mean - 1).bit_length() if mean else 0), 4096)
    return ShapeClass(dim, hidden_dim, rows, str(dtype).removeprefix("torch."), capability(device))


def capability(device: torch.device) -> tuple[int, int]:
    """Return the device's compute capability."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else INTERPRETER


@cache
def _tuned() -> dict[str, list[int]]:
    return json.loads(TUNED_FILE.read_text())


def choose(product: str, shape: ShapeClass) -> Blocks:
    """Return the block sizes of one product for a shape class."""
    tuned = _tuned().get(shape.key(product))
    return Blocks(*tuned) if tuned else default(product, shape)


def default(product: str, shape: ShapeClass) -> Blocks:
    """Return block sizes that fit: in 16-bit dtypes chosen on an H200 at D 2048, F 768, small ones in fp32."""
    if shape.capability == INTERPRETER:
        return Blocks(16, 16, 32, 2, 4, 1)
    roomy, full = shape.capability[0] in (9, 10), shape.dtype == "float32"
    if full:  # exact fp32 products run without tensor cores and keep both operands in registers
        return Blocks(32, 32 if product == "up" else 64, 32, 8, 4, 2)
    if product == "weight_gradient":
        columns = 256 if min(shape.dim, shape.hidden_dim) >= 256 else 128
        return Blocks(128, columns, 32, 8, 8, 4)
    # The gradient of hidden has three more numbers at hand at its end for each that it adds up.
    rows = min(max(shape.rows, 32), 64 if product == "hidden_gradient" else 128)
    width = shape.dim if product == "rows" else shape.hidden_dim
    # `up` adds up two tiles for swiglu.
    columns = min(max(triton.next_power_of_2(width), 64), 128 if product == "up" else 256)
    return Blocks(rows, columns, 64, 8, 8 if rows == 128 or product == "hidden_gradient" else 4, 4 if roomy else 3)
