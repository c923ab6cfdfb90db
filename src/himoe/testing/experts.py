"""What every experts module must satisfy, as one call: `check_experts(lambda: MyExperts(4, 8), dim=8)`.

Each check is a function below; together they are the contract of what `MoE` calls,
(x (T, D), expert_ids (T, K), weights (T, K), kept (T, K)) → Σ_k weight·expert(x) over each token's kept pairs.
The module is its own reference: many pairs at once must be what it says of one token with one expert at a time.

Pairs that are not kept count as absent, whatever stands in their place: weights there, and all of a token without any
kept pair, may even be NaN, as padding of somebody else's model can be. Their gradients are exactly 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}
FILL = 7.0  # what is in empty memory is anybody's guess


class _Batch(NamedTuple):
    """Inputs of one call."""

    x: Tensor
    expert_ids: Tensor
    weights: Tensor
    kept: Tensor


class _Bench:
    """Fresh experts, always the same, and batches for them."""

    def __init__(self, make: Callable[[], nn.Module], dim: int, top_k: int, dtype: torch.dtype) -> None:
        self.make, self.dim, self.dtype = make, dim, dtype
        self.name = type(make()).__name__
        given = getattr(make(), "num_experts", None)
        self.expect(isinstance(given, int) and given >= 1, f"num_experts must be a whole number ≥ 1, is {given!r}")
        self.num_experts: int = given  # type: ignore[assignment]
        self.top_k = min(top_k, self.num_experts)

    def experts(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().to(self.dtype)

    def batch(self, tokens: int, kept: float = 0.6, *, seed: int = 0) -> _Batch:
        """Return tokens with different experts each, of which about the share `kept` is kept."""
        generator = torch.Generator().manual_seed(seed)
        ranks = torch.rand(tokens, self.num_experts, generator=generator)
        return _Batch(
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
        if not bool(condition):
            raise AssertionError(f"{self.name}: {text}")

    def close(self, one: Tensor, other: Tensor) -> bool:
        """Equal but for rounding, relative to the largest value."""
        if one.shape != other.shape or not bool(one.isfinite().all()):
            return False
        difference = (one.double() - other.double()).abs().amax() if one.numel() else torch.zeros(())
        scale = other.double().abs().amax().clamp(min=1) if other.numel() else 1
        return bool(difference <= TOLERANCE[self.dtype] * scale)


def _gradients(y: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    """Return the gradients of y for an upstream gradient that is a ramp; zeros where nothing leads there."""
    if not y.requires_grad:
        return [torch.zeros_like(t) for t in wanted]
    upstream = torch.linspace(-1, 2, y.numel()).view_as(y).to(y.dtype)
    found = torch.autograd.grad(y, wanted, upstream, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


def _trained(experts: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in experts.named_parameters() if parameter.requires_grad}


def _run(experts: nn.Module, batch: _Batch, how: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """Return y and the gradients of x, of the weights and of every parameter that is not frozen."""
    x, weights = batch.x.clone().requires_grad_(), batch.weights.clone().requires_grad_()
    pairs = (x, batch.expert_ids.clone(), weights, batch.kept.clone())
    y = experts(*pairs) if how is None else how(experts, *pairs)
    return [y.detach(), *_gradients(y, [x, weights, *_trained(experts).values()])]


def _pair_by_pair(experts: nn.Module, x: Tensor, expert_ids: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
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


def check_sum(bench: _Bench) -> None:
    """Many pairs at once give what one pair at a time gives, output and gradients, in every odd shape."""
    one_expert = bench.batch(7, kept=2.0)
    first = torch.arange(bench.top_k) == 0
    one_expert = one_expert._replace(
        expert_ids=torch.where(first, bench.num_experts - 1, one_expert.expert_ids), kept=one_expert.kept & first
    )
    cases = {
        "some pairs kept": bench.batch(9),
        "all pairs kept": bench.batch(5, kept=2.0, seed=1),
        "one token": bench.batch(1, kept=2.0),
        "no token": bench.batch(0),
        "all tokens to one expert": one_expert,
        "no pair kept": bench.batch(4, kept=-1.0),
    }
    for case, batch in cases.items():
        experts = bench.experts()
        together, alone = _run(experts, batch), _run(experts, batch, _pair_by_pair)
        names = ["output", "gradient of x", "gradient of the weights"]
        names += [f"gradient of {name}" for name in _trained(experts)]
        for name, value, expected in zip(names, together, alone, strict=True):
            bench.expect(bench.close(value, expected), f"{case}: the {name} is not that of one pair at a time")


def check_unkept(bench: _Bench) -> None:
    """Pairs that are not kept give nothing and get no gradient, whatever stands there, NaN included."""
    batch = bench.batch(9)
    batch.kept[2:4] = False
    absent = ~batch.kept.any(-1)
    experts = bench.experts()
    clean = _run(experts, batch)
    dirty = _run(
        experts,
        batch._replace(
            x=torch.where(absent[:, None], torch.nan, batch.x),
            weights=batch.weights.where(batch.kept, torch.nan),
            expert_ids=batch.expert_ids.where(batch.kept, 0),
        ),
    )
    bench.expect(not dirty[0][absent].any(), "a token without kept pairs has an output other than 0")
    bench.expect(bench.close(dirty[0], clean[0]), "what stands in the place of an unkept pair changes the output")
    bench.expect(not dirty[1][absent].any(), "a token without kept pairs has a gradient")
    bench.expect(not dirty[2][~batch.kept].any(), "the weight of an unkept pair has a gradient")
    same = all(bench.close(a, b) for a, b in zip(dirty, clean, strict=True))
    bench.expect(same, "what stands in the place of an unkept pair changes a gradient")


def check_tokens(bench: _Bench) -> None:
    """A token's output depends neither on its place in the batch nor on the other tokens."""
    experts, batch = bench.experts(), bench.batch(13, seed=3)
    y = _run(experts, batch)[0]
    order = torch.arange(13).flip(0)
    moved = _run(experts, _Batch(*(part[order] for part in batch)))[0]
    bench.expect(bench.close(moved, y[order]), "the order of the tokens changes their outputs")
    mine, others = torch.arange(13) % 3 == 0, bench.batch(13, kept=2.0, seed=2)
    others = others._replace(x=others.x * 5)
    mixed = _Batch(*(torch.where(mine[:, None], a, b) for a, b in zip(batch, others, strict=True)))
    bench.expect(bench.close(_run(experts, mixed)[0][mine], y[mine]), "other tokens change a token's output")


def check_training(bench: _Bench) -> None:
    """Gradients reach x and every parameter that is not frozen; a forward pass changes nothing but its result.

    Of parameters away from their start, since a part may start at 0 and keep the gradient of another at 0 so far.
    """
    experts, batch = bench.experts(), bench.batch(12 * bench.num_experts, kept=2.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    y, grad_x, _, *grads = _run(experts, batch)
    h = 1e-6 if bench.dtype == torch.float64 else 1e-2
    direction = torch.randn(batch.x.shape, generator=generator).to(bench.dtype)
    up, down = (_run(experts, batch._replace(x=batch.x + step * direction))[0] for step in (h, -h))
    upstream = torch.linspace(-1, 2, y.numel()).view_as(y).to(bench.dtype)
    slope, expected = (grad_x * direction).sum(), ((up - down) * upstream).sum() / (2 * h)
    bench.expect(not (up - down).any() or grad_x.any(), "the output depends on x, and x has no gradient")
    near = (slope - expected).abs() <= 1e-4 * expected.abs().clamp(min=1)
    bench.expect(bench.dtype != torch.float64 or near, "the gradient of x is not the slope of the output")
    for name, grad in zip(_trained(experts), grads, strict=True):
        bench.expect(grad.isfinite().all() and grad.any(), f"parameter {name} gets no finite gradient other than 0")
    before, given = _state(experts), _Batch(*(part.clone() for part in batch))
    with torch.no_grad():
        y = experts(*given)
        bench.expect(all(map(torch.equal, batch, given)), "a forward pass changed its input in place")
        bench.expect(torch.equal(experts(*batch), y), "the same call twice gives two results")
    unchanged = all(torch.equal(before[n], v) for n, v in _state(experts).items())
    bench.expect(unchanged, "a forward pass changed a parameter or buffer")


def check_half_precision(bench: _Bench) -> None:
    """A bf16 model gets bf16 back, near the exact result, with finite gradients."""
    half = _Bench(bench.make, bench.dim, bench.top_k, torch.bfloat16)
    batch = half.batch(9)
    y, *gradients = _run(half.experts(), batch)
    bench.expect(y.dtype == torch.bfloat16, f"in bf16 the output is {y.dtype}")
    bench.expect(all(g.isfinite().all() for g in gradients), "in bf16 a gradient is not finite")
    exact = half.experts().to(bench.dtype)(
        batch.x.to(bench.dtype), batch.expert_ids, batch.weights.to(bench.dtype), batch.kept
    )
    bench.expect(half.close(y, exact), "in bf16 the output is far from the exact one")


def check_state(bench: _Bench) -> None:
    """What the experts are is saved, and can be set to its start after `to_empty` on the meta device."""
    fresh, batch = bench.experts(), bench.batch(9)
    torch.manual_seed(1)
    restored = bench.make().to(bench.dtype)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(0.1)
    restored.load_state_dict(fresh.state_dict())
    bench.expect(torch.equal(restored(*batch), fresh(*batch)), "acts otherwise after save and load: unsaved state")
    with torch.device("meta"):
        empty = bench.make()
    empty = empty.to_empty(device="cpu").to(bench.dtype)
    with torch.no_grad():
        for value in (*empty.parameters(), *empty.buffers()):
            value.fill_(FILL)
    torch.manual_seed(2)
    for module in empty.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    start = _state(bench.experts())
    for name, value in _state(empty).items():
        alike = bool(value.isfinite().all()) and _alike(value.double(), start[name].double())
        bench.expect(alike, f"reset_parameters() after to_empty() does not start {name} as the constructor does")


def _alike(value: Tensor, start: Tensor) -> bool:
    """Draws of about the same mean and spread, or equal constants."""
    if not value.is_floating_point() or value.numel() < 2 or not start.std():
        return torch.equal(value, start)
    near = 6 * start.std() / start.numel() ** 0.5
    return bool((value.mean() - start.mean()).abs() <= near and 0.5 <= value.std() / start.std() <= 2)


def _state(experts: nn.Module) -> dict[str, Tensor]:
    named = (*experts.named_parameters(), *experts.named_buffers())
    return {name: value.detach().clone() for name, value in named}


def check_compiles(bench: _Bench) -> None:
    """Compiles as one graph, hence reads nothing back to the host, and gives the same."""
    experts, batch = bench.experts(), bench.batch(9)
    torch.compiler.reset()
    try:
        found = torch.compile(experts, fullgraph=True, backend="eager")(*batch)
    except Exception as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise AssertionError(f"{bench.name}: does not compile as one graph: {first}; if so, compiles=False") from error
    bench.expect(bench.close(found, experts(*batch)), "the output differs when compiled")


CHECKS = (
    check_sum,
    check_unkept,
    check_tokens,
    check_training,
    check_half_precision,
    check_state,
)


def check_experts(
    make: Callable[[], nn.Module],
    *,
    dim: int,
    top_k: int = 2,
    dtype: torch.dtype = torch.float32,
    compiles: bool = True,
) -> None:
    """Run every check on experts that `make` builds.

    Args:
        make: no arguments → fresh experts of width `dim`, drawn from torch's global random numbers. They say their
            number as `num_experts`, and have no dropout, or are in eval mode: they are called in the mode they have.
        dim: D.
        top_k: K; all E where there are fewer.
        dtype: in which pairs are compared, float32 or float64, where the experts can do that; only in float64 is the
            gradient of x compared with differences of the output.
        compiles: False for experts that need not compile as one graph, since their kernel reads sizes on the host.

    Raises:
        AssertionError: the first contract that does not hold, with the name of the experts' class.

    >>> from himoe import SwiGLUExperts
    >>> check_experts(lambda: SwiGLUExperts(4, 8, 16), dim=8)
    """
    for check in (*CHECKS, check_compiles) if compiles else CHECKS:
        check(_Bench(make, dim, top_k, dtype))
