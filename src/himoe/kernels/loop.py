"""Backend `loop`: one dense product after another over the experts, rows gathered expert by expert.

Runs everywhere in every floating dtype. On a CPU each expert's rows are gathered while they are needed, so nothing of
size (T·K, D) is made of the input. On a GPU it reads the counts back to the host; prefer `grouped` there.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from himoe.functional.dispatch import SortedPairs
from himoe.kernels.activation import ACTIVATIONS


def _expert_rows(offsets: Tensor) -> Iterator[slice]:
    start = 0
    for end in offsets.tolist():
        yield slice(start, end)
        start = end


def forward(
    x: Tensor, weights: Tensor, rows: SortedPairs, up_proj: Tensor, down_proj: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Return y (T, D) and the up projection's output (T·K, H), rows in expert order."""
    act = ACTIVATIONS[activation]
    num_pairs, top_k = rows.pair_of_row.numel(), weights.shape[1]
    token_of_row = rows.pair_of_row // top_k
    weight_of_row = weights.flatten()[rows.pair_of_row, None].to(x.dtype)
    hidden = x.new_empty(num_pairs, up_proj.shape[1])
    out = x.new_empty(num_pairs, x.shape[1])
    for here, up, down in zip(_expert_rows(rows.offsets), up_proj.unbind(), down_proj.unbind(), strict=True):
        if here.start < here.stop:
            torch.mm(x[token_of_row[here]], up.T, out=hidden[here])
            unit = act.forward(hidden[here]).mul_(weight_of_row[here])
            torch.mm(unit, down.T, out=out[here])
    out[int(rows.offsets[-1]) :] = 0
    return sum_pairs(out, rows, top_k), hidden


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
    num_pairs, top_k = rows.pair_of_row.numel(), weights.shape[1]
    token_of_row = rows.pair_of_row // top_k
    weight_of_row = weights.flatten()[rows.pair_of_row, None].to(x.dtype)
    d_row = x.new_empty(num_pairs, x.shape[1]) if need_x else None
    d_weight_of_row = x.new_zeros(num_pairs) if need_weights else None
    d_up = torch.empty_like(up_proj) if need_up else None
    d_down = torch.empty_like(down_proj) if need_down else None
    experts = zip(_expert_rows(rows.offsets), up_proj.unbind(), down_proj.unbind(), strict=True)
    for e, (here, up, down) in enumerate(experts):
        if here.start == here.stop:
            for d_projection in (d_up, d_down):
                if d_projection is not None:
                    d_projection[e] = 0
            continue
        tokens, weight = token_of_row[here], weight_of_row[here]
        d_y = grad[tokens]
        d_unit = d_y @ down
        if need_weights or need_down:
            unit = act.forward(hidden[here])
            if d_weight_of_row is not None:
                torch.linalg.vecdot(d_unit, unit, out=d_weight_of_row[here])
            if d_down is not None:
                torch.mm(d_y.T, unit.mul_(weight), out=d_down[e])
        d_hidden = act.backward(hidden[here], d_unit.mul_(weight))
        if d_row is not None:
            torch.mm(d_hidden, up, out=d_row[here])
        if d_up is not None:
            torch.mm(d_hidden.T, x[tokens], out=d_up[e])
    if d_row is not None:
        d_row[int(rows.offsets[-1]) :] = 0
    d_x = None if d_row is None else sum_pairs(d_row, rows, top_k)
    d_weights = None
    if d_weight_of_row is not None:
        d_weights = d_weight_of_row[rows.row_of_pair].view_as(weights).to(weights.dtype)
    return d_x, d_weights, d_up, d_down


def sum_pairs(values: Tensor, rows: SortedPairs, top_k: int) -> Tensor:
    """Add up each token's K sorted rows, (T·K, D) → (T, D): a gather, hence deterministic, not an index_add."""
    return values[rows.row_of_pair].unflatten(0, (-1, top_k)).sum(1)
