# type: ignore  # kernels are written in the language of Triton, which pyright takes for Python
"""What the kernels share: activations and their derivatives, tiles of rows, loads that may reach past an edge."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a·b with fp32 sums."""
    if INTERPRETED:  # which multiplies the bits of bf16 as integers; in fp32 the same products are exact
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load(pointers, row_fits, column_fits, CHECK_ROWS: tl.constexpr, CHECK_COLUMNS: tl.constexpr):
    """Load a tile, 0 where its row or column does not fit; unchecked sides always fit."""
    if CHECK_ROWS and CHECK_COLUMNS:
        return tl.load(pointers, mask=row_fits[:, None] & column_fits[None, :], other=0.0)
    if CHECK_ROWS:
        return tl.load(pointers, mask=row_fits[:, None], other=0.0)
    if CHECK_COLUMNS:
        return tl.load(pointers, mask=column_fits[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def tile_and_column(program, num_tiles, num_columns, GROUP: tl.constexpr):
    """Return a program's tile of rows and its block of columns: GROUP tiles share columns while those are cached."""
    first = program // (GROUP * num_columns) * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    within = program % (GROUP * num_columns)
    return first + within % size, within // size


@triton.jit
def activate(gate, value, ACTIVATION: tl.constexpr):
    """Return the activation in fp32; `value` is used by swiglu alone."""
    if ACTIVATION == "swiglu":
        return gate * tl.sigmoid(gate) * value
    if ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    if ACTIVATION == "relu":
        return tl.where(gate <= 0, 0.0, gate)  # not tl.maximum, which loses a NaN
    positive = tl.where(gate <= 0, 0.0, gate)  # relu2
    return positive * positive


@triton.jit
def activate_backward(gate, value, grad, ACTIVATION: tl.constexpr):
    """Return the gradients of gate and value in fp32; without swiglu the second means nothing."""
    if ACTIVATION == "swiglu":
        share = tl.sigmoid(gate)
        return grad * value * share * (1.0 + gate * (1.0 - share)), grad * gate * share
    if ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        return grad * (0.5 * (1.0 + tl.erf(gate * 0.7071067811865476)) + gate * density), grad
    if ACTIVATION == "relu":
        return tl.where(gate <= 0, 0.0, grad), grad
    return 2.0 * grad * tl.where(gate <= 0, 0.0, gate), grad  # relu2


@triton.jit
def tile_map(offsets, tiles, num_experts, num_tiles, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr, MANY: tl.constexpr):
    """Write (expert, first row) of every tile, expert -1 for tiles that are not needed. Program e writes expert e's."""
    mine = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    ends = tl.load(offsets + e, mask=e < num_experts, other=0)
    starts = tl.load(offsets + e - 1, mask=(e > 0) & (e < num_experts), other=0)
    counts = (ends - starts + BLOCK_M - 1) // BLOCK_M
    before = tl.sum(tl.where(e < mine, counts, 0), 0)
    count = tl.sum(tl.where(e == mine, counts, 0), 0)
    start = tl.sum(tl.where(e == mine, starts, 0), 0)
    i = tl.arange(0, MANY)
    for done in range(0, count, MANY):
        inside = done + i < count
        tl.store(tiles + 2 * (before + done + i), mine + 0 * i, mask=inside)
        tl.store(tiles + 2 * (before + done + i) + 1, start + (done + i) * BLOCK_M, mask=inside)
    if mine == num_experts - 1:
        for unused in range(before + count, num_tiles, MANY):
            tl.store(tiles + 2 * (unused + i), 0 * i - 1, mask=unused + i < num_tiles)


@triton.jit
def combine(values, row_of_pair, offsets, out, width, num_experts, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Write the sum of each token's K rows, in fp32, in the order of its choices; unkept pairs' are not read."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept_rows = tl.load(offsets + num_experts - 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_of_pair + token * TOP_K + k)
        end = tl.where(row < kept_rows, width, 0)
        total += tl.load(values + row * width + column, mask=column < end, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=column < width)
