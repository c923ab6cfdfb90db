"""What every experts module must satisfy, as one call: `check_experts(lambda: MyExperts(4, 8), dim=8)`.

Each check is a function below; together they are the contract of what `MoE` calls,
(x (T, D), expert_ids (T, K), weights (T, K), kept (T, K)) → Σ_k weight·expert(x) over each token's kept pairs.
The module is its own reference: many pairs at once must be what it says of one token with one expert at a time.

Pairs that are not kept count as absent, whatever stands in their place: weights there, and all of a token without any
kept pair, may even be NaN, as padding of somebody else's model can be. Their gradients are exactly 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from himoe.testing.experts_bench import Batch, Bench, in_small_batches, pair_by_pair, run, shares_of_experts, trained

MANY = 300
FILL = 7.0  # what is in empty memory is anybody's guess


def check_sum(bench: Bench) -> None:
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
        _compare(bench, case, batch, pair_by_pair, "one pair at a time")


def check_many(bench: Bench) -> None:
    """Hundreds of tokens, half of which choose the same expert, give what they give in small batches: none is lost."""
    crowded = bench.batch(MANY, kept=0.9, crowded=True)
    _compare(bench, f"{MANY} tokens", crowded, in_small_batches, "the same tokens in small batches")


def _compare(bench: Bench, case: str, batch: Batch, how: Callable[..., Tensor], of: str) -> None:
    experts = bench.experts()
    together, apart = run(experts, batch), run(experts, batch, how)
    names = ["output", "gradient of x", "gradient of the weights"]
    names += [f"gradient of {name}" for name in trained(experts)]
    for name, value, expected in zip(names, together, apart, strict=True):
        bench.expect(bench.close(value, expected), f"{case}: the {name} is not that of {of}")


def check_unkept(bench: Bench) -> None:
    """Pairs that are not kept give nothing and get no gradient, whatever stands there, NaN included."""
    batch = bench.batch(9)
    batch.kept[2:4] = False
    absent = ~batch.kept.any(-1)
    experts = bench.experts()
    clean = run(experts, batch)
    dirty = run(
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


def check_tokens(bench: Bench) -> None:
    """A token's output depends neither on its place in the batch nor on the other tokens."""
    experts, batch = bench.experts(), bench.batch(13, seed=3)
    y = run(experts, batch)[0]
    order = torch.arange(13).flip(0)
    moved = run(experts, Batch(*(part[order] for part in batch)))[0]
    bench.expect(bench.close(moved, y[order]), "the order of the tokens changes their outputs")
    mine, others = torch.arange(13) % 3 == 0, bench.batch(13, kept=2.0, seed=2)
    others = others._replace(x=others.x * 5)
    mixed = Batch(*(torch.where(mine[:, None], a, b) for a, b in zip(batch, others, strict=True)))
    bench.expect(bench.close(run(experts, mixed)[0][mine], y[mine]), "other tokens change a token's output")


def check_training(bench: Bench) -> None:
    """Gradients reach x and each expert's share of all that is trained; a forward pass changes nothing but its result.

    Of parameters away from their start, since a part may start at 0 and keep the gradient of another at 0 so far.
    """
    experts, batch = bench.experts(), bench.batch(12 * bench.num_experts, kept=2.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    y, grad_x, _, *grads = run(experts, batch)
    h = 1e-6 if bench.dtype == torch.float64 else 1e-2
    direction = torch.randn(batch.x.shape, generator=generator).to(bench.dtype)
    up, down = (run(experts, batch._replace(x=batch.x + step * direction))[0] for step in (h, -h))
    upstream = torch.linspace(-1, 2, y.numel()).view_as(y).to(bench.dtype)
    slope, expected = (grad_x * direction).sum(), ((up - down) * upstream).sum() / (2 * h)
    bench.expect(not (up - down).any() or grad_x.any(), "the output depends on x, and x has no gradient")
    near = (slope - expected).abs() <= 1e-4 * expected.abs().clamp(min=1)
    bench.expect(bench.dtype != torch.float64 or near, "the gradient of x is not the slope of the output")
    for name, grad in zip(trained(experts), grads, strict=True):
        bench.expect(grad.isfinite().all() and grad.any(), f"parameter {name} gets no finite gradient other than 0")
        for expert, share in enumerate(shares_of_experts(experts, name, grad)):
            bench.expect(share.any(), f"parameter {name} gets no gradient where expert {expert} has its share of it")
    exchanged = batch._replace(expert_ids=(batch.expert_ids + 1) % bench.num_experts)
    alike = bench.num_experts > 1 and grads and torch.equal(run(experts, exchanged)[0], y)
    bench.expect(not alike, "every token goes to another expert, and the output is the same")
    before, given = _state(experts), Batch(*(part.clone() for part in batch))
    with torch.no_grad():
        y = experts(*given)
        bench.expect(all(map(torch.equal, batch, given)), "a forward pass changed its input in place")
        bench.expect(torch.equal(experts(*batch), y), "the same call twice gives two results")
    unchanged = all(torch.equal(before[n], v) for n, v in _state(experts).items())
    bench.expect(unchanged, "a forward pass changed a parameter or buffer")


def check_half_precision(bench: Bench) -> None:
    """A bf16 model gets bf16 back, near the exact result, with finite gradients."""
    half = Bench(bench.make, bench.dim, bench.top_k, torch.bfloat16)
    batch = half.batch(9)
    y, *gradients = run(half.experts(), batch)
    bench.expect(y.dtype == torch.bfloat16, f"in bf16 the output is {y.dtype}")
    bench.expect(all(g.isfinite().all() for g in gradients), "in bf16 a gradient is not finite")
    exact = half.experts().to(bench.dtype)(
        batch.x.to(bench.dtype), batch.expert_ids, batch.weights.to(bench.dtype), batch.kept
    )
    bench.expect(half.close(y, exact), "in bf16 the output is far from the exact one")


def check_state(bench: Bench) -> None:
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


def check_compiles(bench: Bench) -> None:
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
    check_many,
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
        check(Bench(make, dim, top_k, dtype))
