"""The expert MLP out of kernels: which run, on what, in which order. Nothing here reads a number from the device."""

from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from himoe.functional.dispatch import SortedPairs
from himoe.kernels.activation import ACTIVATIONS
from himoe.kernels.triton import parts, products
from himoe.kernels.triton.blocks import Blocks, ShapeClass, choose, shape_class


def precision() -> str:
    """Return how fp32 is multiplied: exactly, unless torch is told that tf32 will do."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, blocks: Blocks | None = None, **constants: Any) -> None:
    """Run a kernel on its first argument's device; an empty grid runs nothing."""
    if 0 in grid:
        return
    if blocks is not None:
        constants |= blocks._asdict()
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, enable_fp_fusion=True, **constants)


class Pairs:
    """The sorted pairs of one call, with their tiles.

    Args:
        rows: the sorted pairs.
        top_k: K.
        shape: the call's shape class.
    """

    def __init__(self, rows: SortedPairs, top_k: int, shape: ShapeClass) -> None:
        self.rows, self.top_k, self.shape = rows, top_k, shape
        self.num_pairs, self.num_experts = rows.pair_of_row.numel(), rows.offsets.numel()
        self._tiles: dict[int, Tensor] = {}

    def blocks(self, product: str) -> Blocks:
        """Return the block sizes of a product."""
        return choose(product, self.shape)

    def tiles(self, size: int) -> Tensor:
        """Return (expert, first row) of every tile of `size` rows, with room for the most there can be."""
        if size not in self._tiles:
            most = self.num_pairs // size + self.num_experts
            tiles = self.rows.offsets.new_empty(most, 2)
            experts = triton.next_power_of_2(self.num_experts)
            arguments = self.rows.offsets, tiles, self.num_experts, most
            launch(parts.tile_map, (self.num_experts,), *arguments, BLOCK_M=size, EXPERTS=experts, MANY=64)
            self._tiles[size] = tiles
        return self._tiles[size]

    def combine(self, values: Tensor) -> Tensor:
        """Add up each token's kept rows, (T·K, D) → (T, D)."""
        width = values.shape[1]
        tokens = self.num_pairs // self.top_k
        out = values.new_empty(tokens, width)
        block = min(triton.next_power_of_2(width), 1024)
        arguments = values, self.rows.row_of_pair, self.rows.offsets, out, width, self.num_experts
        launch(parts.combine, (tokens, triton.cdiv(width, block)), *arguments, TOP_K=self.top_k, BLOCK=block)
        return out


def up_product(x: Tensor, weights: Tensor, up: Tensor, pairs: Pairs, activation: str, blocks: Blocks):
    """Return hidden (T·K, H) and act(hidden)·weight (T·K, F)."""
    (_, height, dim), units = up.shape, up.shape[1] // ACTIVATIONS[activation].rows
    hidden, unit = x.new_empty(pairs.num_pairs, height), x.new_empty(pairs.num_pairs, units)
    tiles = pairs.tiles(blocks.M)
    launch(
        products.up_product,
        (tiles.shape[0] * triton.cdiv(units, blocks.N),),
        *(x, up, weights, pairs.rows.pair_of_row, pairs.rows.offsets, tiles, hidden, unit),
        *(tiles.shape[0], dim, units, *up.stride()),
        K=pairs.top_k,
        ACTIVATION=activation,
        PRECISION=precision(),
        CHECK_D=dim % blocks.STEP != 0,
        CHECK_F=units % blocks.N != 0,
        blocks=blocks,
    )
    return hidden, unit


def row_product(values: Tensor, weight: Tensor, pairs: Pairs, blocks: Blocks) -> Tensor:
    """Return values (T·K, n) times each row's expert's matrix, weight (E, n, m) of any strides."""
    _, depth, width = weight.shape
    out, tiles = values.new_empty(pairs.num_pairs, width), pairs.tiles(blocks.M)
    launch(
        products.row_product,
        (tiles.shape[0] * triton.cdiv(width, blocks.N),),
        *(values, weight, pairs.rows.offsets, tiles, out, tiles.shape[0], depth, width, *weight.stride()),
        PRECISION=precision(),
        CHECK_K=depth % blocks.STEP != 0,
        CHECK_N=width % blocks.N != 0,
        blocks=blocks,
    )
    return out


def hidden_gradient(
    grad: Tensor,
    weights: Tensor,
    hidden: Tensor,
    down: Tensor,
    pairs: Pairs,
    activation: str,
    blocks: Blocks,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of hidden (T·K, H), act(hidden)·weight (T·K, F) and shares of d_weight (T·K, blocks of F).

    `grad` (T·K, D) is that of the output, a row a pair. Those not in `needs` have no rows. Rows of unkept pairs are
    uninitialised.
    """
    _, dim, units = down.shape
    columns, tiles = triton.cdiv(units, blocks.N), pairs.tiles(blocks.M)
    hidden_rows, unit_rows, weight_rows = (pairs.num_pairs * need for need in needs)
    d_hidden = hidden.new_empty(hidden_rows, hidden.shape[1])
    unit = hidden.new_empty(unit_rows, units)
    d_weight = hidden.new_empty(weight_rows, columns, dtype=torch.float32)
    launch(
        products.hidden_gradient,
        (tiles.shape[0] * columns,),
        *(grad, down, weights, hidden, pairs.rows.pair_of_row, pairs.rows.offsets, tiles, d_hidden, unit, d_weight),
        *(tiles.shape[0], dim, units, *down.stride()),
        **dict(zip(("NEED_HIDDEN", "NEED_UNIT", "NEED_WEIGHTS"), needs, strict=True)),
        ACTIVATION=activation,
        PRECISION=precision(),
        CHECK_D=dim % blocks.STEP != 0,
        CHECK_F=units % blocks.N != 0,
        blocks=blocks,
    )
    return d_hidden, unit, d_weight


def weight_gradient(a: Tensor, b: Tensor, like: Tensor, pairs: Pairs, blocks: Blocks) -> Tensor:
    """Return Σ aᵀb over every expert's rows, shaped and laid out as `like`."""
    _, height, width = like.shape
    out = torch.empty_like(like)
    launch(
        products.weight_gradient,
        (pairs.num_experts * triton.cdiv(height, blocks.M) * triton.cdiv(width, blocks.N),),
        *(a, b, pairs.rows.offsets, out, height, width, *out.stride()),
        PRECISION=precision(),
        CHECK_M=height % blocks.M != 0,
        CHECK_N=width % blocks.N != 0,
        blocks=blocks,
    )
    return out


def _pairs(x: Tensor, weights: Tensor, rows: SortedPairs, down: Tensor) -> Pairs:
    num_experts, dim, units = down.shape
    shape = shape_class(dim, units, weights.numel(), num_experts, x.dtype, x.device)
    return Pairs(rows, weights.shape[1], shape)


def forward(x: Tensor, weights: Tensor, rows: SortedPairs, up: Tensor, down: Tensor, activation: str):
    """Return y (T, D) and the up projection's output (T·K, H), rows in expert order."""
    pairs = _pairs(x, weights, rows, down)
    hidden, unit = up_product(x, weights, up, pairs, activation, pairs.blocks("up"))
    return pairs.combine(row_product(unit, down.transpose(1, 2), pairs, pairs.blocks("rows"))), hidden


def backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    hidden: Tensor,
    rows: SortedPairs,
    up: Tensor,
    down: Tensor,
    activation: str,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weights, up and down, None where not needed."""
    need_x, need_weights, need_up, need_down = needs
    pairs = _pairs(x, weights, rows, down)
    writes = (need_x or need_up, need_down, need_weights)
    # The forward product gathers while it multiplies. Here that would be slower: sums over rows wait for their numbers.
    token = rows.pair_of_row // pairs.top_k
    grad_rows = grad[token]
    blocks = pairs.blocks("hidden_gradient")
    d_hidden, unit, shares = hidden_gradient(grad_rows, weights, hidden, down, pairs, activation, blocks, writes)
    d_x = d_weights = d_up = d_down = None
    if need_weights:
        kept = torch.arange(pairs.num_pairs, device=x.device) < rows.offsets[-1]
        d_weights = shares.sum(1).where(kept, 0)[rows.row_of_pair].view_as(weights).to(weights.dtype)
    if need_down:
        d_down = weight_gradient(grad_rows, unit, down, pairs, pairs.blocks("weight_gradient"))
    del grad_rows, unit
    if need_up:
        d_up = weight_gradient(d_hidden, x[token], up, pairs, pairs.blocks("weight_gradient"))
    if need_x:
        d_x = pairs.combine(row_product(d_hidden, up, pairs, pairs.blocks("rows")))
    return d_x, d_weights, d_up, d_down
