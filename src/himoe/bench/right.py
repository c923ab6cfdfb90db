"""The gate before the clock: output and all gradients of a contestant against the fp64 answer, row by row.

A row is a token of y and x, a token's K numbers of weights, an expert of both projections. Its error is
‖given − right‖ / max(‖right‖, floor), and a tensor's error is its worst row's, so that one wrong expert among hundreds
is seen however few tokens it has. The floor is a thousandth of the root mean square of the rows' norms: there, an
expert without tokens must have no gradient. For the weights it is that root mean square itself, since a weight's
gradient is one dot product and may cancel.

Tolerances: fp32 2e-5. bf16 5e-2: its spacing is 2⁻⁸, and a row sees a few roundings and K additions, some peers' in
bf16.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

TOLERANCE = {"fp32": 2e-5, "bf16": 5e-2}
FLOOR = {"weights": 1.0}
SMALL_FLOOR = 1e-3


def worst_row(given: Tensor, right: Tensor, floor: float = SMALL_FLOOR) -> float:
    """Return the largest relative error of a row; infinity where anything is not finite or shapes differ.

    >>> right = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    >>> worst_row(torch.tensor([[3.0, 4.0], [0.0, 5.5]]), right)
    0.1
    """
    if given.shape != right.shape or not given.isfinite().all():
        return float("inf")
    norms = right.double().flatten(1).norm(dim=1)
    errors = (given.double() - right.double()).flatten(1).norm(dim=1)
    least = max(floor * norms.square().mean().sqrt().item(), torch.finfo(torch.float64).tiny)
    return round((errors / norms.clamp(min=least)).max().item(), 12)


def errors(given: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the error of every tensor of the answer; infinity for one that was not given."""
    nothing = torch.empty(0)
    return {
        name: worst_row(given.get(name, nothing), tensor, FLOOR.get(name, SMALL_FLOOR))
        for name, tensor in right.items()
    }


def complaint(found: Mapping[str, float], dtype: str) -> str | None:
    """Return what is wrong, None where every error is within the tolerance."""
    wrong = [f"{name} {error:.1e}" for name, error in found.items() if not error <= TOLERANCE[dtype]]
    return f"relative error of {', '.join(wrong)}; at most {TOLERANCE[dtype]:.0e} is rounding" if wrong else None
