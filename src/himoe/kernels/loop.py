"""Backend `loop`: one dense product after another over the experts, rows gathered expert by expert.

Runs everywhere in every floating dtype. On a CPU each expert's rows are gathered while they are needed, so nothing of
size (T·K, D) is made of the input; and bf16 is widened expert by expert for fp32 products where the CPU has no bf16
instructions, which torch's own bf16 products miss by a factor of 5 to 80. On a GPU it reads the counts back to the
host; prefer `grouped` there.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from himoe.functional.dispatch import SortedPairs
from himoe.kernels import large_pages
from himoe.kernels.activation import ACTIVATIONS


def _expert_rows(offsets: Tensor) -> Iterator[slice]:
    start = 0
    for end in offsets.tolist():
        yield slice(start, end)
        start = end


@functools.cache
def multiplies_bf16() -> bool:
    """Return whether torch has fast bf16 products on this CPU."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _product_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.is_cpu and x.dtype == torch.bfloat16 and not multiplies_bf16() else x.dtype


def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def forward(
    x: Tensor, weights: Tensor, rows: SortedPairs, up_proj: Tensor, down_proj: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Return y (T, D) and the up projection's output (T·K, H), rows in expert order."""
    act, dtype = ACTIVATIONS[activation], _product_dtype(x)
    num_pairs, top_k = rows.pair_of_row.numel(), weights.shape[1]
    token_of_row = rows.pair_of_row // top_k
    weight_of_row = weights.flatten()[rows.pair_of_row, None].to(dtype)
    hidden = large_pages.empty(num_pairs, up_proj.shape[1], like=x)
    out = large_pages.empty(num_pairs, x.shape[1], like=x)
    for here, up, down in zip(_expert_rows(rows.offsets), up_proj.unbind(), down_proj.unbind(), strict=True):
        if here.start < here.stop:
            _mm(x.index_select(0, token_of_row[here]).to(dtype), up.to(dtype).T, hidden[here])
            unit = act.forward(hidden[here].to(dtype)).mul_(weight_of_row[here])
            _mm(unit, down.to(dtype).T, out[here])
    return _sum_pairs(out, rows, top_k), hidden


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
    weight_of_row = weights.flatten()[rows.pair_of_row, None].to(dtype)
    d_row = large_pages.empty(num_pairs, x.shape[1], like=x) if need_x else None
    d_weight_of_row = x.new_zeros(num_pairs, dtype=dtype) if need_weights else None
    d_up = large_pages.empty(*up_proj.shape, like=up_proj) if need_up else None
    d_down = large_pages.empty(*down_proj.shape, like=down_proj) if need_down else None
    experts = zip(_expert_rows(rows.offsets), up_proj.unbind(), down_proj.unbind(), strict=True)
    for e, (here, up, down) in enumerate(experts):
        if here.start == here.stop:
            for d_projection in (d_up, d_down):
                if d_projection is not None:
                    d_projection[e] = 0
            continue
        tokens, weight, hidden_here = token_of_row[here], weight_of_row[here], hidden[here].to(dtype)
        d_y = grad.index_select(0, tokens).to(dtype)
        d_unit = d_y @ down.to(dtype)
        if need_weights or need_down:
            unit = act.forward(hidden_here)
            if d_weight_of_row is not None:
                torch.linalg.vecdot(d_unit, unit, out=d_weight_of_row[here])
            if d_down is not None:
                _mm(d_y.T, unit.mul_(weight), d_down[e])
        d_hidden = act.backward(hidden_here, d_unit.mul_(weight))
        if d_row is not None:
            _mm(d_hidden, up.to(dtype), d_row[here])
        if d_up is not None:
            _mm(d_hidden.T, x.index_select(0, tokens).to(dtype), d_up[e])
    d_x = None if d_row is None else _sum_pairs(d_row, rows, top_k)
    d_weights = None
    if d_weight_of_row is not None:
        d_weights = d_weight_of_row[rows.row_of_pair].view_as(weights).to(weights.dtype)
    return d_x, d_weights, d_up, d_down


def _sum_pairs(values: Tensor, rows: SortedPairs, top_k: int) -> Tensor:
    """Add up each token's K sorted rows, (T·K, D) → (T, D): a gather, hence deterministic, not an index_add."""
    values[int(rows.offsets[-1]) :] = 0  # rows of unkept pairs, which nobody wrote
    if not values.is_cpu or values.dtype == torch.float16:
        return values[rows.row_of_pair].unflatten(0, (-1, top_k)).sum(1)
    return F.embedding_bag(rows.row_of_pair.view(-1, top_k), values, mode="sum")  # no (T·K, D) copy
