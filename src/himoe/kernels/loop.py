"""Backend `loop`: one dense product after another over the experts, all else over a few experts at once.

Runs everywhere in every floating dtype. Rows are gathered for the next experts only, so nothing of size (T·K, D) is
made of the input, and what one batch of experts leaves in the cache its next step finds there. On a CPU several
batches are computed at a time, each by one thread (`workers`), then those experts that have a large share of all rows,
by all threads. On a CPU without bf16 instructions, where torch's bf16 products are 5 to 80 times slower than fp32
ones, bf16 is widened for them. On a GPU it reads the counts back to the host; prefer `grouped` there.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from himoe.functional.dispatch import SortedPairs
from himoe.kernels import caching_allocator
from himoe.kernels.activation import ACTIVATIONS
from himoe.kernels.workers import share_out

ROWS, PART = 2048, 16  # a batch of experts has at most so many rows, and this part of all, or else one expert
SMALL = 2**24  # multiplications of all rows with one projection: fewer are done before a worker has woken up


class _Batch(NamedTuple):
    """Consecutive experts: which, their sorted rows, and how many each has."""

    experts: slice
    rows: slice
    sizes: list[int]


def _batches(offsets: Tensor, most: int) -> Iterator[_Batch]:
    first = start = end = 0
    sizes: list[int] = []
    for e, next_end in enumerate(offsets.tolist()):
        if sizes and next_end - start > most:
            yield _Batch(slice(first, e), slice(start, end), sizes)
            first, start, sizes = e, end, []
        sizes.append(next_end - end)
        end = next_end
    yield _Batch(slice(first, first + len(sizes)), slice(start, end), sizes)


@functools.cache
def multiplies_bf16() -> bool:
    """Return whether torch has fast bf16 products on this CPU."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _product_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.is_cpu and x.dtype == torch.bfloat16 and not multiplies_bf16() else x.dtype


def _num_workers(x: Tensor, work: int) -> int:
    return torch.get_num_threads() if x.is_cpu and work >= SMALL else 1


def _over_batches(do: Callable[[_Batch, Tensor], None], x: Tensor, rows: SortedPairs, row: int, cost: int) -> None:
    """Call do(batch, space) for all batches, space being fresh memory of (rows of the batch, `row`).

    Args:
        do: must write to what no other batch does.
        x: whose dtype in products and device the space has.
        rows: of all experts.
        row: numbers a row needs, for what exists only while a batch is computed.
        cost: multiplications of a row.
    """
    total = int(rows.offsets[-1])
    threads = _num_workers(x, total * cost)
    most = min(ROWS, total // max(PART, 4 * threads))
    batches = sorted(_batches(rows.offsets, most), key=lambda b: b.rows.start - b.rows.stop)
    wide = [b for b in batches if threads == 1 or (b.rows.stop - b.rows.start) * 2 * threads > total]
    for some, workers in ((batches[len(wide) :], threads), (wide, 1)):  # OpenMP's threads would disturb the workers
        if some:
            size = -(-(some[0].rows.stop - some[0].rows.start) * row // 64) * 64  # aligned alike, or BLAS's bits differ
            like = x.new_empty(0, dtype=_product_dtype(x))
            share_out(do, some, caching_allocator.empty(min(workers, len(some)), size, like=like).unbind())


def _carve(space: Tensor, num_rows: int, *widths: int) -> list[Tensor]:
    """Return a (num_rows, width) tensor for each width, one behind the other in `space`."""
    parts = space[: num_rows * sum(widths)].split([num_rows * width for width in widths])
    return [part.view(num_rows, width) for part, width in zip(parts, widths, strict=True)]


def _gather(tokens: Tensor, ids: Tensor, out: Tensor) -> Tensor:
    if tokens.dtype == out.dtype:
        return torch.index_select(tokens, 0, ids, out=out)
    return out.copy_(tokens[ids])


def _products(lefts: Sequence[Tensor], rights: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """Write left·right of every expert into out; an expert without rows gets zeros for a weight's gradient."""
    one_dtype = lefts[0].dtype == rights[0].dtype == outs[0].dtype
    for left, right, out in zip(lefts, rights, outs, strict=True):
        if one_dtype:
            torch.mm(left, right, out=out)
        else:
            out.copy_(left @ right.to(left.dtype))


def forward(
    x: Tensor, weights: Tensor, rows: SortedPairs, up_proj: Tensor, down_proj: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Return y (T, D) and the up projection's output (T·K, H), rows in expert order."""
    act, dtype = ACTIVATIONS[activation], _product_dtype(x)
    num_pairs, top_k = rows.pair_of_row.numel(), weights.shape[1]
    token_of_row = rows.pair_of_row // top_k
    _, width, units = down_proj.shape
    hidden = caching_allocator.empty(num_pairs, up_proj.shape[1], like=x)
    out = caching_allocator.empty(num_pairs, width, like=x)

    def run(batch: _Batch, space: Tensor) -> None:
        experts, here, sizes = batch
        ups, downs = (w[experts].transpose(1, 2).unbind() for w in (up_proj, down_proj))
        x_here, unit = _carve(space, sum(sizes), width, units)
        _gather(x, token_of_row[here], x_here)
        _products(x_here.split(sizes), ups, hidden[here].split(sizes))
        act.forward(hidden[here].to(dtype), unit)
        if x.dtype == torch.float16:  # what is not weighted yet may be too large for it
            unit.mul_(weights.flatten().index_select(0, rows.pair_of_row[here])[:, None].to(dtype))
        _products(unit.split(sizes), downs, out[here].split(sizes))

    _over_batches(run, x, rows, width + units, width * units)
    return sum_pairs(out, rows, top_k, None if x.dtype == torch.float16 else weights), hidden


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
    act, dtype = ACTIVATIONS[activation], _product_dtype(x)
    need_x, need_weights, need_up, need_down = needs
    num_pairs, top_k = rows.pair_of_row.numel(), weights.shape[1]
    token_of_row = rows.pair_of_row // top_k
    weight_of_row = weights.flatten().index_select(0, rows.pair_of_row)[:, None].to(dtype)
    _, width, units = down_proj.shape
    d_row = caching_allocator.empty(num_pairs, width, like=x) if need_x else None
    d_weight_of_row = x.new_zeros(num_pairs, dtype=dtype) if need_weights else None
    d_up = caching_allocator.empty(*up_proj.shape, like=up_proj) if need_up else None
    d_down = caching_allocator.empty(*down_proj.shape, like=down_proj) if need_down else None

    def run(batch: _Batch, space: Tensor) -> None:
        experts, here, sizes = batch
        tokens, weight, hidden_here = token_of_row[here], weight_of_row[here], hidden[here].to(dtype)
        d_y, unit, d_unit, d_hidden = _carve(space, sum(sizes), width, units, units, hidden.shape[1])
        _gather(grad, tokens, d_y)
        _products(d_y.split(sizes), down_proj[experts].unbind(), d_unit.split(sizes))
        if act.shared is not None:
            act.shared(hidden_here, unit, d_hidden)
        elif need_weights or need_down:
            act.forward(hidden_here, unit)
        if d_down is not None:
            _products(d_y.mul_(weight).T.split(sizes, 1), unit.split(sizes), d_down[experts].unbind())
        if d_weight_of_row is not None:
            torch.sum(unit.mul_(d_unit), 1, out=d_weight_of_row[here])
        if not (need_x or need_up):
            return
        (act.backward_of_shared or act.backward)(hidden_here, d_unit.mul_(weight), d_hidden)
        if d_row is not None:
            _products(d_hidden.split(sizes), up_proj[experts].unbind(), d_row[here].split(sizes))
        if d_up is not None:
            x_here = _gather(x, tokens, d_y)  # d_y is done with
            _products(d_hidden.T.split(sizes, 1), x_here.split(sizes), d_up[experts].unbind())

    _over_batches(run, x, rows, width + 2 * units + hidden.shape[1], width * units)
    d_x = None if d_row is None else sum_pairs(d_row, rows, top_k)
    d_weights = None
    if d_weight_of_row is not None:
        d_weights = d_weight_of_row.index_select(0, rows.row_of_pair).view_as(weights).to(weights.dtype)
    return d_x, d_weights, d_up, d_down


def sum_pairs(values: Tensor, rows: SortedPairs, top_k: int, weights: Tensor | None = None) -> Tensor:
    """Add up each token's K sorted rows, times weights (T, K) if given: (T·K, D) → (T, D), a gather, no index_add.

    Sets the rows of unkept pairs to 0, which nobody wrote.
    """
    values[int(rows.offsets[-1]) :] = 0
    if weights is not None:  # those of unkept pairs may be anything
        weights = weights.to(values.dtype).where((rows.row_of_pair < rows.offsets[-1]).view_as(weights), 0)
    row_of_pair, threads = rows.row_of_pair.view(-1, top_k), _num_workers(values, 16 * values.numel())
    if threads == 1:
        return _sum(values, row_of_pair, weights)
    y = caching_allocator.empty(len(row_of_pair), values.shape[1], like=values)
    size = -(-len(y) // (4 * threads))

    def run(start: int, _: None) -> None:
        here = slice(start, start + size)
        y[here] = _sum(values, row_of_pair[here], None if weights is None else weights[here])

    share_out(run, range(0, len(y), size), [None] * threads)
    return y


def _sum(values: Tensor, ids: Tensor, weights: Tensor | None) -> Tensor:
    if values.is_cpu and values.dtype != torch.float16:  # no (T·K, D) copy
        return F.embedding_bag(ids, values, mode="sum", per_sample_weights=weights)
    pairs = values[ids]
    return (pairs if weights is None else pairs * weights[..., None]).sum(1)
