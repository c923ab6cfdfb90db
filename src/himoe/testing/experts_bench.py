"""What `check_experts` measures with: fresh experts, batches for them, and what they make of one."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}


class Batch(NamedTuple):
    """Inputs of one call."""

    x: Tensor
    expert_ids: Tensor
    weights: Tensor
    kept: Tensor


class Bench:
    """Fresh experts, always the same, and batches for them."""

    def __init__(self, make: Callable[[], nn.Module], dim: int, top_k: int, dtype: torch.dtype) -> None:
        self.make, self.dim, self.dtype = make, dim, dtype
        self.name = type(make()).__name__
        given = getattr(make(), "num_experts", None)
        self.expect(isinstance(given, int) and given >= 1, f"num_experts must be a whole number ≥ 1, is {given!r}")
        self.num_experts: int = given  # type: ignore[assignment]
        self.top_k = min(top_k, self.num_experts)

    def experts(self) -> nn.Module:
        """Return experts that begin as they always do."""
        torch.manual_seed(0)
        return self.make().to(self.dtype)

    def batch(self, tokens: int, kept: float = 0.6, *, seed: int = 0, crowded: bool = False) -> Batch:
        """Return tokens with different experts each, of which about the share `kept` is kept.

        Where it is crowded, every second token has expert 0 among its own.
        """
        generator = torch.Generator().manual_seed(seed)
        ranks = torch.rand(tokens, self.num_experts, generator=generator)
        ranks[::2, 0] += crowded
        return Batch(
            torch.randn(tokens, self.dim, generator=generator).to(self.dtype),
            ranks.topk(self.top_k).indices,
            (torch.rand(tokens, self.top_k, generator=generator) + 0.1).to(self._weights_dtype),
            torch.rand(tokens, self.top_k, generator=generator) < kept,
        )

    @property
    def _weights_dtype(self) -> torch.dtype:
        """The router's: at least fp32."""
        return torch.promote_types(self.dtype, torch.float32)

    def expect(self, condition: bool | Tensor, text: str) -> None:
        """Raise AssertionError, with the name of the experts' class, unless the condition holds."""
        if not bool(condition):
            raise AssertionError(f"{self.name}: {text}")

    def close(self, one: Tensor, other: Tensor) -> bool:
        """Equal but for rounding, relative to the largest value."""
        if one.shape != other.shape or not bool(one.isfinite().all()):
            return False
        difference = (one.double() - other.double()).abs().amax() if one.numel() else torch.zeros(())
        scale = other.double().abs().amax().clamp(min=1) if other.numel() else 1
        return bool(difference <= TOLERANCE[self.dtype] * scale)


def gradients(y: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    """Return the gradients of y for an upstream gradient that is a ramp; zeros where nothing leads there."""
    if not y.requires_grad:
        return [torch.zeros_like(t) for t in wanted]
    upstream = torch.linspace(-1, 2, y.numel()).view_as(y).to(y.dtype)
    found = torch.autograd.grad(y, wanted, upstream, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


def trained(experts: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are not frozen."""
    return {name: parameter for name, parameter in experts.named_parameters() if parameter.requires_grad}


def run(experts: nn.Module, batch: Batch, how: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """Return y and the gradients of x, of the weights and of every parameter that is not frozen."""
    x, weights = batch.x.clone().requires_grad_(), batch.weights.clone().requires_grad_()
    pairs = (x, batch.expert_ids.clone(), weights, batch.kept.clone())
    y = experts(*pairs) if how is None else how(experts, *pairs)
    return [y.detach(), *gradients(y, [x, weights, *trained(experts).values()])]


def pair_by_pair(experts: nn.Module, x: Tensor, expert_ids: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """Call the experts for one token and one expert with weight 1 at a time, and add up."""
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros_like(x[t])
        for k in range(expert_ids.shape[1]):
            if kept[t, k]:
                one, true = torch.ones(1, 1, dtype=weights.dtype), torch.ones(1, 1, dtype=torch.bool)
                alone = experts(x[t : t + 1], expert_ids[t : t + 1, k : k + 1], one, true)[0]
                y = y + weights[t, k].to(x.dtype) * alone
        rows.append(y)
    return torch.stack(rows) if rows else torch.zeros_like(x)


def in_small_batches(experts: nn.Module, *pairs: Tensor) -> Tensor:
    """Call the experts for a few tokens at a time, as many as are compared pair by pair."""
    return torch.cat([experts(*part) for part in zip(*(part.split(9) for part in pairs), strict=True)])


def shares_of_experts(experts: nn.Module, name: str, value: Tensor) -> list[Tensor]:
    """Cut what belongs to a parameter into each expert's share, where its first dimension divides by their number.

    The number is that of the module which holds the parameter, such as one pool of several, or the next one around it.
    """
    number, module = experts.num_experts, experts
    for inner in name.split(".")[:-1]:
        module = module.get_submodule(inner)
        number = getattr(module, "num_experts", number)
    return [*value.chunk(number)] if value.ndim and value.shape[0] % number == 0 else []  # type: ignore[arg-type]
