"""Block sizes of the kernels: measured ones from `tuned.json` for their shape class, else what fits the chip by design.

A shape class is (product, D, F, rows per expert rounded up to 32, 64, 128 …, dtype, compute capability). Nothing is
searched when a layer runs; `python -m himoe.kernels.triton.tune` searches on a GPU and writes the table.
`tuned.json` is empty until somebody has measured: the defaults below are reasoned from shared memory (163 KiB a block
on capability 8.0, 227 KiB on 9.0) and registers, not timed.
"""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

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
    """Return block sizes that fit: about 96 KiB of tiles in flight in 16-bit dtypes, small ones in fp32."""
    if shape.capability == INTERPRETER:
        return Blocks(16, 16, 32, 2, 4, 1)
    hopper, full = shape.capability[0] >= 9, shape.dtype == "float32"
    if full:  # exact fp32 products run without tensor cores and keep both operands in registers
        return Blocks(32, 32 if product == "up" else 64, 32, 8, 4, 2)
    if product == "weight_gradient":  # rows are summed over here, so few of them want short steps
        # The gathered side is loaded through the pairs' numbers, and stages are shared among both loads.
        return Blocks(128, 128, 32 if shape.rows <= 32 else 64, 8, 8, 6 if hopper else 4)
    rows = min(max(shape.rows, 32), 128)
    # `up` adds up two tiles for swiglu, and the gradient of hidden has four at hand at its end: wider ones spill.
    columns = 64 if product in ("up", "hidden_gradient") else 128
    return Blocks(rows, columns, 64, 8, 8 if rows == 128 else 4, 4 if hopper else 3)
