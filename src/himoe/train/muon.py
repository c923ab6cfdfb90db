"""Muon: orthogonalised momentum on the hidden weight matrices, AdamW on all other parameters, in one optimizer.

For a matrix W with gradient G (Jordan et al., https://kellerjordan.github.io/posts/muon; the scale and the decay as in
Moonlight, arXiv 2502.16982), lr and λ being the learning rate and the weight decay of AdamW, which carry over:

    M ← μ·M + (1 − μ)·G
    W ← (1 − lr·λ)·W − lr·0.2·√max(rows, columns)·NS((1 − μ)·G + μ·M)

NS is five Newton–Schulz steps, which bring all singular values near 1. A weight may hold several matrices: experts
stacked along the first dimension, or projections fused along the rows (query, key and value; gate and up). Each is
orthogonalised on its own, since together the larger ones would decide the update of the others.

Deviations: NS runs in bf16 on a GPU, as published, but in fp32 on a CPU, where small bf16 products are slower. A matrix
whose gradient is zero in a step, such as that of an expert without tokens, takes no NS term in it, only its decay: NS
brings what is left of the momentum back to full size however small it has become, so the expert would drift on.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adamw import adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
NORM_EPSILON = 1e-7
RMS = 0.2  # of an AdamW update, about


class Muon(torch.optim.Optimizer):
    """Update parameter groups that have `rows` by Muon, the others by AdamW.

    Args:
        groups: dictionaries with `params`, optionally `weight_decay`, and `rows` for Muon: the numbers of rows of the
            matrices that each parameter (…, rows, columns) of the group holds along its last but one dimension.
        lr: learning rate of both.
        momentum: μ.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: decoupled, of groups that name none.
        dtype: of the Newton–Schulz steps; None is bf16 on a GPU and fp32 on a CPU.

    >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
    >>> weight.grad = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    >>> Muon([{"params": [weight], "rows": (2,)}], lr=1.0).step()
    >>> [round(value, 2) for value in weight.diag().tolist()]  # about −0.2·√2 each
    [-0.31, -0.31]
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        dtype: torch.dtype | None = None,
    ) -> None:
        adam = {"betas": betas, "eps": eps}
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "rows": None, **adam})
        self._dtype = dtype
        for group in self.param_groups:
            rows, shapes = group["rows"], [tuple(parameter.shape) for parameter in group["params"]]
            assert rows is None or all(len(shape) >= 2 and shape[-2] == sum(rows) for shape in shapes), (rows, shapes)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Do one step; `closure`, if any, is called first to compute the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["rows"] is None:
                self._adamw(group, parameters)
            else:
                for parameter in parameters:
                    self._muon(group, parameter)
        return loss

    def _muon(self, group: dict[str, Any], parameter: Tensor) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(state["momentum"], group["momentum"])
        dtype = self._dtype or (torch.float32 if parameter.device.type == "cpu" else torch.bfloat16)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parts = (tensor.split(group["rows"], dim=-2) for tensor in (parameter, update, gradient))
        for matrix, change, of in zip(*parts, strict=True):
            moved = torch.linalg.vector_norm(of, math.inf, dim=(-2, -1), keepdim=True) != 0
            scale = RMS * math.sqrt(max(matrix.shape[-2:]))
            matrix.add_(orthogonalise(change.where(moved, 0), dtype), alpha=-group["lr"] * scale)

    def _adamw(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        if not parameters:
            return
        for parameter in parameters:
            if not self.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] |= {"step": torch.zeros((), device=parameter.device), **moments}
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            list(parameters),
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=all(parameter.device.type in ("cpu", "cuda") for parameter in parameters),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalise(
    matrices: Float[Tensor, "*stack rows columns"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*stack rows columns"]:
    """Return U·S·Vᵀ for each matrix U·Σ·Vᵀ of the stack, with all of S between about 0.7 and 1.2, in `matrices`' dtype.

    >>> [round(value, 2) for value in orthogonalise(torch.diag(torch.tensor([5.0, 2.0]))).diag().tolist()]
    [0.73, 1.05]
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.flatten(0, -3) if matrices.ndim > 2 else matrices[None]
    x = (x.mT if tall else x).to(dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=NORM_EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape).to(matrices.dtype)
