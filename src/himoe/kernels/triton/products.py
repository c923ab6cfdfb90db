# type: ignore  # kernels are written in the language of Triton, which pyright takes for Python
"""The grouped products: up with the activation, rows by weights, the gradient of hidden, rows by rows.

A program of the first three has one tile of rows, all of one expert, and one block of columns. Rows past the expert's
last one are replaced by it in loads and are not stored. Offsets of rows and experts are 64 bits wide.
"""

import triton
import triton.language as tl

from himoe.kernels.triton.parts import activate, activate_backward, dot, load, tile_and_column


@triton.jit
def up_product(
    x, up, weights, pair_of_row, offsets, tiles, hidden, unit, num_tiles, D, F, stride_e, stride_h, stride_d,
    K: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, CHECK_D: tl.constexpr, CHECK_F: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write hidden = x[token]·upᵀ and unit = act(hidden)·weight."""
    tile, block = tile_and_column(tl.program_id(0), num_tiles, tl.cdiv(F, N), GROUP)
    expert = tl.load(tiles + 2 * tile).to(tl.int64)
    if expert < 0:
        return
    first, m = tl.load(tiles + 2 * tile + 1), tl.arange(0, M)
    row = first + m
    end = tl.load(offsets + expert)
    exists = row < end
    pair = tl.load(pair_of_row + tl.minimum(row, end - 1))
    column, d = block * N + tl.arange(0, N), tl.arange(0, STEP)
    fits = column < F
    of_x = x + (pair // K * D)[:, None] + d[None, :]
    of_gate = up + expert * stride_e + column.to(tl.int64)[None, :] * stride_h + d[:, None] * stride_d
    jump = tl.full((), F, tl.int64) * stride_h  # from a gate's row of `up` to its value's
    gate = tl.zeros((M, N), tl.float32)
    value = tl.zeros((M, N), tl.float32)
    for done in range(0, D, STEP):
        rest = d < D - done
        a = load(of_x, exists, rest, False, CHECK_D)
        gate = dot(a, load(of_gate, rest, fits, CHECK_D, CHECK_F), gate, PRECISION)
        if ACTIVATION == "swiglu":
            value = dot(a, load(of_gate + jump, rest, fits, CHECK_D, CHECK_F), value, PRECISION)
        of_x += STEP
        of_gate += STEP * stride_d
    weight = tl.load(weights + pair).to(tl.float32)
    stored = exists[:, None] & fits[None, :]
    H = 2 * F if ACTIVATION == "swiglu" else F
    of_hidden = hidden + first.to(tl.int64) * H + (m[:, None] * H + column[None, :])
    tl.store(of_hidden, gate.to(hidden.dtype.element_ty), mask=stored)
    if ACTIVATION == "swiglu":
        tl.store(of_hidden + F, value.to(hidden.dtype.element_ty), mask=stored)
    result = activate(gate, value, ACTIVATION) * weight[:, None]
    of_unit = unit + first.to(tl.int64) * F + (m[:, None] * F + column[None, :])
    tl.store(of_unit, result.to(unit.dtype.element_ty), mask=stored)


@triton.jit
def row_product(
    a, b, offsets, tiles, out, num_tiles, depth, width, stride_e, stride_k, stride_n,
    PRECISION: tl.constexpr, CHECK_K: tl.constexpr, CHECK_N: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write out[row] = a[row]·b[expert], b (E, depth, width) of any strides."""
    tile, block = tile_and_column(tl.program_id(0), num_tiles, tl.cdiv(width, N), GROUP)
    expert = tl.load(tiles + 2 * tile).to(tl.int64)
    if expert < 0:
        return
    first, m = tl.load(tiles + 2 * tile + 1), tl.arange(0, M)
    row = first + m
    end = tl.load(offsets + expert)
    exists = row < end
    column, k = block * N + tl.arange(0, N), tl.arange(0, STEP)
    fits = column < width
    of_a = a + tl.minimum(row, end - 1).to(tl.int64)[:, None] * depth + k[None, :]
    of_b = b + expert * stride_e + k.to(tl.int64)[:, None] * stride_k + column.to(tl.int64)[None, :] * stride_n
    total = tl.zeros((M, N), tl.float32)
    for done in range(0, depth, STEP):
        rest = k < depth - done
        left = load(of_a, exists, rest, False, CHECK_K)
        total = dot(left, load(of_b, rest, fits, CHECK_K, CHECK_N), total, PRECISION)
        of_a += STEP
        of_b += STEP * stride_k
    of_out = out + first.to(tl.int64) * width + (m[:, None] * width + column[None, :])
    tl.store(of_out, total.to(out.dtype.element_ty), mask=exists[:, None] & fits[None, :])


@triton.jit
def hidden_gradient(
    grad, down, weights, hidden, pair_of_row, offsets, tiles, d_hidden, unit, d_weight_parts,
    num_tiles, D, F, stride_e, stride_d, stride_f,
    NEED_HIDDEN: tl.constexpr, NEED_UNIT: tl.constexpr, NEED_WEIGHTS: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, CHECK_D: tl.constexpr, CHECK_F: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write the gradient of hidden, the weighted activation again, and d_weight's share of the columns.

    `grad` has one row a pair. The end works on one half of the columns after the other, to have half as many numbers in
    registers.
    """
    tile, block = tile_and_column(tl.program_id(0), num_tiles, tl.cdiv(F, N), GROUP)
    expert = tl.load(tiles + 2 * tile).to(tl.int64)
    if expert < 0:
        return
    first, m = tl.load(tiles + 2 * tile + 1), tl.arange(0, M)
    row = first + m
    end = tl.load(offsets + expert)
    exists = row < end
    safe_row = tl.minimum(row, end - 1)
    column, d = block * N + tl.arange(0, N), tl.arange(0, STEP)
    fits = column < F
    of_grad = grad + safe_row.to(tl.int64)[:, None] * D + d[None, :]
    of_down = down + expert * stride_e + d.to(tl.int64)[:, None] * stride_d + column.to(tl.int64)[None, :] * stride_f
    d_unit = tl.zeros((M, N), tl.float32)
    for done in range(0, D if NEED_HIDDEN or NEED_WEIGHTS else 0, STEP):
        rest = d < D - done
        left = load(of_grad, exists, rest, False, CHECK_D)
        d_unit = dot(left, load(of_down, rest, fits, CHECK_D, CHECK_F), d_unit, PRECISION)
        of_grad += STEP
        of_down += STEP * stride_d
    weight = tl.load(weights + tl.load(pair_of_row + safe_row)).to(tl.float32)
    H = 2 * F if ACTIVATION == "swiglu" else F
    start = first.to(tl.int64) * H
    share = tl.zeros((M,), tl.float32)
    halves = tl.split(tl.permute(tl.reshape(d_unit, (M, 2, N // 2)), (0, 2, 1)))
    for half in tl.static_range(2):
        column = block * N + half * (N // 2) + tl.arange(0, N // 2)
        here = exists[:, None] & (column < F)[None, :]
        place = m[:, None] * H + column[None, :]  # within the tile, 32 bits wide
        gate = tl.load(hidden + start + place, mask=here, other=0.0).to(tl.float32)
        value = gate
        if ACTIVATION == "swiglu":
            value = tl.load(hidden + start + F + place, mask=here, other=0.0).to(tl.float32)
        if NEED_WEIGHTS or NEED_UNIT:
            again = activate(gate, value, ACTIVATION)
            if NEED_WEIGHTS:
                share += tl.sum(tl.where(here, halves[half] * again, 0.0), 1)
            if NEED_UNIT:
                of_unit = unit + first.to(tl.int64) * F + (m[:, None] * F + column[None, :])
                tl.store(of_unit, (again * weight[:, None]).to(unit.dtype.element_ty), mask=here)
        if NEED_HIDDEN:
            d_gate, d_value = activate_backward(gate, value, halves[half] * weight[:, None], ACTIVATION)
            tl.store(d_hidden + start + place, d_gate.to(d_hidden.dtype.element_ty), mask=here)
            if ACTIVATION == "swiglu":
                tl.store(d_hidden + start + F + place, d_value.to(d_hidden.dtype.element_ty), mask=here)
    if NEED_WEIGHTS:
        tl.store(d_weight_parts + row.to(tl.int64) * tl.cdiv(F, N) + block, share, mask=exists)


@triton.jit
def weight_gradient(
    a, b, offsets, out, height, width, stride_e, stride_m, stride_n,
    PRECISION: tl.constexpr, CHECK_M: tl.constexpr, CHECK_N: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write out[expert] = Σ a[row]ᵀ·b[row] over the expert's rows, 0 for none."""
    blocks = tl.cdiv(height, M) * tl.cdiv(width, N)
    expert = (tl.program_id(0) // blocks).to(tl.int64)
    block_m, block_n = tile_and_column(tl.program_id(0) % blocks, tl.cdiv(height, M), tl.cdiv(width, N), GROUP)
    m, n, r = block_m * M + tl.arange(0, M), block_n * N + tl.arange(0, N), tl.arange(0, STEP)
    m_fits, n_fits = m < height, n < width
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    # From step to step only a scalar moves: no addresses of whole tiles, in 64 bits, are computed anew.
    of_a = a + start.to(tl.int64) * height
    of_b = b + start.to(tl.int64) * width
    place_a, place_b = r[:, None] * height + m[None, :], r[:, None] * width + n[None, :]
    total = tl.zeros((M, N), tl.float32)
    for begin in range(start, end, STEP):
        exists = r < end - begin
        left = load(of_a + place_a, exists, m_fits, True, CHECK_M)
        right = load(of_b + place_b, exists, n_fits, True, CHECK_N)
        total = dot(tl.trans(left), right, total, PRECISION)
        of_a += STEP * height
        of_b += STEP * width
    of_out = out + expert * stride_e + m.to(tl.int64)[:, None] * stride_m + n.to(tl.int64)[None, :] * stride_n
    tl.store(of_out, total.to(out.dtype.element_ty), mask=m_fits[:, None] & n_fits[None, :])
