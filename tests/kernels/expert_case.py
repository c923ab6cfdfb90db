"""Inputs of the expert MLP for a test, and its output and gradients by any implementation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from himoe.functional import reference
from himoe.kernels import expert_mlp

NAMES = ("x", "weights", "up_proj", "down_proj")


@dataclass
class Case:
    x: Tensor
    expert_ids: Tensor
    weights: Tensor
    kept: Tensor
    up_proj: Tensor
    down_proj: Tensor
    activation: str

    def arguments(self, dtype=None, device="cpu"):
        """Positional arguments, floating ones cast and detached from everything."""
        floats = {n: getattr(self, n).to(device, dtype or getattr(self, n).dtype).detach() for n in NAMES}
        ids, kept = self.expert_ids.to(device), self.kept.to(device)
        return floats["x"], ids, floats["weights"], kept, floats["up_proj"], floats["down_proj"]


def make_case(
    tokens=7, width=16, units=8, num_experts=5, k=2, *, kept="some", spread="all", activation="swiglu", seed=0
):
    """Build a case.

    Args:
        kept: `all`, `some` or `none` of the pairs.
        spread: `all` experts take part, `few` leaves the upper half without a token, `one` sends everything to one.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    ranks = torch.rand(tokens, num_experts, generator=generator)
    if spread == "few":
        ranks[:, max(k, num_experts // 2) :] = -1
    expert_ids = ranks.topk(k).indices
    if spread == "one":
        expert_ids = torch.full((tokens, k), num_experts - 1)
    chance = {"all": 2.0, "some": 0.6, "none": -1.0}[kept]
    up_rows = units * (2 if activation == "swiglu" else 1)
    return Case(
        normal(tokens, width),
        expert_ids,
        torch.rand(tokens, k, dtype=torch.float64, generator=generator),
        torch.rand(tokens, k, generator=generator) < chance,
        normal(num_experts, up_rows, width) / width**0.5,
        normal(num_experts, width, units) / units**0.5,
        activation,
    )


def run(case, *, backend, dtype=torch.float64, upstream=None, trained=NAMES, device="cpu"):
    """Return y and the gradients of x, weights, up_proj and down_proj for the upstream gradient (default: a ramp)."""
    arguments = case.arguments(dtype, device)
    floats = dict(zip(NAMES, (arguments[0], arguments[2], arguments[4], arguments[5]), strict=True))
    for name in trained:
        floats[name].requires_grad_()
    if backend == "reference":
        y = reference.moe(*arguments, case.activation)
    else:
        y = expert_mlp(*arguments, activation=case.activation, backend=backend)
    if not y.requires_grad:  # the reference of a batch without kept pairs
        return y, {name: torch.zeros_like(floats[name]) for name in trained}
    upstream = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y) if upstream is None else upstream
    grads = torch.autograd.grad(y, [floats[n] for n in trained], upstream.to(y), allow_unused=True)
    filled = [torch.zeros_like(floats[n]) if g is None else g for n, g in zip(trained, grads, strict=True)]
    return y.detach().cpu(), dict(zip(trained, (g.cpu() for g in filled), strict=True))


def assert_equal(one, other, tolerance):
    """Compare outputs and gradients, the difference relative to the largest value of each.

    Summands are about 1, so that a sum below 0.1 has lost digits to cancellation.
    """
    (y, grads), (y_expected, grads_expected) = one, other
    assert grads.keys() == grads_expected.keys()
    for name, value, expected in [
        ("y", y, y_expected),
        *((n, grads[n], grads_expected[n]) for n in grads),
    ]:
        assert value.shape == expected.shape, name
        assert value.isfinite().all(), name
        scale = expected.double().abs().max().clamp(min=0.1) if expected.numel() else 1
        difference = ((value.double() - expected.double()).abs() / scale).max().item() if expected.numel() else 0
        assert difference <= tolerance, f"{name} differs by {difference:g} of its largest value"
