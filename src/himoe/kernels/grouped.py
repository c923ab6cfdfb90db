"""Backend `grouped`: `torch.nn.functional.grouped_mm` over all experts at once.

In bf16 on a GPU of capability 9.0 or 10.0 that is one kernel, and the counts never leave the device. Elsewhere torch
multiplies expert by expert, for which it reads them back to the host.
Rows of unkept pairs lie past the last offset: grouped_mm leaves them uninitialised, so they are replaced by 0 before
anything reads them. Needs fp32, bf16 or fp16 and rows of a multiple of 16 bytes (`supports`).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from himoe.functional.dispatch import SortedPairs
from himoe.kernels.activation import ACTIVATIONS


def supports(x: Tensor, up_proj: Tensor, down_proj: Tensor) -> bool:
    """Return whether grouped_mm takes these dtypes and row lengths."""
    row_lengths = (x.shape[-1], up_proj.shape[1], down_proj.shape[-1])
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and all(
        n * x.element_size() % 16 == 0 for n in row_lengths
    )


def _sum_kept(values: Tensor, kept_row: Tensor, rows: SortedPairs, top_k: int) -> Tensor:
    """Add up each token's rows, uninitialised ones replaced by 0."""
    pairs = values.where(kept_row, 0)[rows.row_of_pair]
    return pairs.unflatten(0, (-1, top_k)).sum(1)


def _row_facts(weights: Tensor, rows: SortedPairs, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return token (T·K,), weight (T·K, 1) and whether it is kept (T·K, 1) of every sorted row."""
    row = torch.arange(rows.pair_of_row.numel(), device=weights.device)
    weight = weights.flatten()[rows.pair_of_row, None].to(dtype)
    return rows.pair_of_row // weights.shape[1], weight, (row < rows.offsets[-1])[:, None]


def forward(
    x: Tensor, weights: Tensor, rows: SortedPairs, up_proj: Tensor, down_proj: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Return y (T, D) and the up projection's output (T·K, H), rows in expert order."""
    act = ACTIVATIONS[activation]
    token, weight, kept_row = _row_facts(weights, rows, x.dtype)
    hidden = F.grouped_mm(x[token], up_proj.transpose(1, 2), offs=rows.offsets)
    unit = act.forward(hidden, hidden.new_empty(hidden.shape[0], down_proj.shape[2])).mul_(weight)
    out = F.grouped_mm(unit, down_proj.transpose(1, 2), offs=rows.offsets)
    return _sum_kept(out, kept_row, rows, weights.shape[1]), hidden


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
    act = ACTIVATIONS[activation]
    need_x, need_weights, need_up, need_down = needs
    token, weight, kept_row = _row_facts(weights, rows, x.dtype)
    d_y = grad[token]
    d_unit = F.grouped_mm(d_y, down_proj, offs=rows.offsets)
    d_x = d_weights = d_up = d_down = None
    if need_weights or need_down:
        unit = act.forward(hidden, torch.empty_like(d_unit))
        if need_weights:
            d_weight_of_row = torch.linalg.vecdot(d_unit, unit).where(kept_row[:, 0], 0)
            d_weights = d_weight_of_row[rows.row_of_pair].view_as(weights).to(weights.dtype)
        if need_down:
            d_down = F.grouped_mm(d_y.T, unit.mul_(weight), offs=rows.offsets)
    if need_x or need_up:
        d_hidden = act.backward(hidden, d_unit.mul_(weight), torch.empty_like(hidden))
        if need_x:
            d_x = _sum_kept(F.grouped_mm(d_hidden, up_proj, offs=rows.offsets), kept_row, rows, weights.shape[1])
        if need_up:
            d_up = F.grouped_mm(d_hidden.T, x[token], offs=rows.offsets)
    return d_x, d_weights, d_up, d_down
