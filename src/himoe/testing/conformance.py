"""What every balancer must satisfy, as one call: `check_balancer(lambda: MyBalancer(8), num_experts=8)`.

Each check is a function below; together they are the contract of `himoe.balance.base.Balancer`.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from himoe.balance import Balancer, step_balancers
from himoe.functional import scores as score_functions
from himoe.functional.groups import Groups
from himoe.functional.selection import top_k as select_top_k
from himoe.functional.selection import top_k_per_group
from himoe.nn import Gate, Router
from himoe.types import Routing

WIDTH = 6


MakeGate = Callable[[int, int], nn.Module]
NOISE_LEVELS = 1000003  # a prime


class _SteadyNoise(Router):
    """A router whose noise is a function of the token, so that a batch may be padded or cut and is the same batch."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:  # type: ignore[override]
        self._bits = x[:, :1].contiguous().view(torch.int32).to(torch.int64)
        return super().forward(x, mask)

    def standard_noise(self, like: Tensor) -> Tensor:
        column = torch.arange(like.shape[-1]) * 7919 + 104729
        level = (self._bits % NOISE_LEVELS * column) % NOISE_LEVELS  # some number, evenly spread
        return (2**0.5 * torch.erfinv((2.0 * level + 1) / NOISE_LEVELS - 1)).to(like.dtype)


class _Bench:
    """A router around a fresh balancer, and batches to route."""

    def __init__(
        self, make: Callable[[], Balancer], num_experts: int, top_k: int, groups: int | None, score: str, gate: MakeGate
    ):
        self.make, self.num_experts, self.top_k, self.make_gate = make, num_experts, top_k, gate
        self.score = getattr(score_functions, score)
        self.selector = partial(select_top_k, k=top_k)
        if groups is not None:
            self.selector = partial(top_k_per_group, groups=Groups.equal(num_experts, groups), k=top_k // groups)
        self.name = type(make()).__name__

    def router(self, balancer: Balancer) -> Router:
        torch.manual_seed(1)
        return _SteadyNoise(
            self.make_gate(WIDTH, self.num_experts),
            self.selector,
            num_experts=self.num_experts,
            score=self.score,
            balancer=balancer,
        )

    def tokens(self, count: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, WIDTH, generator=generator) + 0.5  # a common offset: some experts are favoured

    def moved(self, balancer: Balancer, *batches: Tensor, mask: Tensor | None = None) -> Balancer:
        """Run one optimizer step over micro-batches."""
        router = self.router(balancer)
        with torch.no_grad():
            for batch in batches:
                balancer.observe(router(batch, mask))
        step_balancers([balancer])
        return balancer

    @staticmethod
    def gradient(loss: Tensor, router: Router) -> Tensor:
        """Return the gradient of all of the gate's parameters, as one vector."""
        parameters = list(router.gate.parameters())
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([grad.flatten() for grad in grads])

    def expect(self, condition: bool, text: str) -> None:
        if not condition:
            raise AssertionError(f"{self.name}: {text}")


def _state(balancer: Balancer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in balancer.named_buffers()}


def _effect(bench: _Bench, balancer: Balancer) -> dict[str, Tensor]:
    """What the balancer does to a fixed batch."""
    routing = bench.router(balancer)(bench.tokens(16, seed=5))
    return {
        "logits": balancer.adjust_logits(routing.logits, routing.context),
        "choice": balancer.adjust_choice(routing.scores, routing.context),
        "loss": _loss(balancer, routing),
    }


def _same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[n].double(), other[n].double(), rtol=0, atol=tolerance) for n in one
    )


def _loss(balancer: Balancer, routing: Routing) -> Tensor:
    return sum(balancer.losses(routing).values(), start=torch.zeros(()))


def check_forward_writes_nothing(bench: _Bench) -> None:
    """Routing and losses, in training and in eval, leave state, sums and their own input untouched."""
    balancer = bench.moved(bench.make(), bench.tokens(32))
    before = _state(balancer)
    router = bench.router(balancer)
    for training in (True, False):
        routing = router.train(training)(bench.tokens(20, seed=1))
        balancer.losses(routing)
        for hook, values in ((balancer.adjust_logits, routing.logits), (balancer.adjust_choice, routing.scores)):
            given = values.detach().clone()
            hook(given, routing.context)
            bench.expect(torch.equal(given, values), f"{hook.__name__}() changed its input in place")
    bench.expect(_same(before, _state(balancer)), "a forward pass or losses() changed the state")
    bench.expect(not any(m.sums for m in balancer.modules() if isinstance(m, Balancer)), "a forward pass observed")


def check_losses(bench: _Bench) -> None:
    """Losses are finite scalars, at least fp32, and train the gate where there are any."""
    router = bench.router(bench.moved(bench.make(), bench.tokens(32)))
    routing = router(bench.tokens(20))
    named = router.balancer.losses(routing)
    for name, value in named.items():
        bench.expect(value.shape == () and bool(value.isfinite()), f"loss {name} is not a finite scalar: {value}")
        bench.expect(value.dtype in (torch.float32, torch.float64), f"loss {name} is {value.dtype}, not fp32")
    total = _loss(router.balancer, routing)
    if named:
        bench.expect(total.requires_grad, "the losses carry no gradient, so they train nothing")
        grad = bench.gradient(total, router)
        bench.expect(bool(grad.isfinite().all()), "a loss gives the gate a gradient that is not finite")


def check_padding(bench: _Bench) -> None:
    """Padding changes no choice, weight, loss, gradient or state."""
    real, padding = bench.tokens(20), bench.tokens(7, seed=9) * 3
    padded = torch.cat([real[:11], padding, real[11:]])
    mask = torch.ones(27, dtype=torch.bool)
    mask[11:18] = False
    start = bench.moved(bench.make(), bench.tokens(32, seed=3)).state_dict()
    results = []
    for x, m in ((real, None), (padded, mask)):
        balancer = bench.make()
        balancer.load_state_dict(start)
        router = bench.router(balancer)
        routing = router(x, m)
        loss = _loss(balancer, routing) + (routing.weights**2).sum()
        grad = bench.gradient(loss, router)
        with torch.no_grad():
            balancer.observe(routing)
        step_balancers([balancer])
        rows = slice(None) if m is None else m
        results.append((routing.expert_ids[rows], routing.weights[rows], loss, grad, _state(balancer)))
    (ids, weights, loss, grad, state), (ids_p, weights_p, loss_p, grad_p, state_p) = results
    bench.expect(torch.equal(ids, ids_p) and torch.allclose(weights, weights_p), "padding changed the routing")
    bench.expect(torch.allclose(loss, loss_p, rtol=1e-5, atol=1e-7), f"padding changed the losses: {loss} → {loss_p}")
    bench.expect(torch.allclose(grad, grad_p, rtol=1e-4, atol=1e-6), "padding changed the gate's gradient")
    bench.expect(_same(state, state_p, 1e-6), "padding changed the state")


def check_step(bench: _Bench) -> None:
    """Only `step` moves the state; without an observation balancing state stays; micro-batches add up to one batch."""
    balancer, batch = bench.make(), bench.tokens(32)
    before = _state(balancer)
    with torch.no_grad():
        balancer.observe(bench.router(balancer)(batch))
    bench.expect(_same(before, _state(balancer)), "observe() moved the state")
    whole = _state(bench.moved(bench.make(), batch))
    parts = _state(bench.moved(bench.make(), *batch.split([17, 12, 3])))
    bench.expect(_same(whole, parts, 1e-6), "three micro-batches move the state elsewhere than one whole batch")
    nothing = bench.tokens(4)
    none = torch.zeros(4, dtype=torch.bool)
    only_padding = bench.moved(bench.make(), nothing, mask=none)
    no_batch = bench.moved(bench.make())
    bench.expect(_same(_state(only_padding), _state(no_batch), 1e-6), "a step that saw only padding moved the state")


def check_state(bench: _Bench) -> None:
    """State has no parameters, moves in place, keeps fp32 in a bf16 model, is saved, and can be reset."""
    balancer = bench.make()
    bench.expect(not list(balancer.parameters()), "state must be buffers; parameters would be given to the optimizer")
    addresses = {name: buffer.data_ptr() for name, buffer in balancer.named_buffers()}
    bench.moved(balancer, bench.tokens(32))
    moved_to = {name: buffer.data_ptr() for name, buffer in balancer.named_buffers()}
    bench.expect(addresses == moved_to, "step() replaced a buffer instead of moving it in place")
    before = _state(balancer)
    balancer.to(torch.bfloat16)
    bench.expect(_same(before, _state(balancer)), ".to(torch.bfloat16) changed the state's values")
    bench.expect(
        all(b.dtype == before[n].dtype for n, b in balancer.named_buffers()), ".to(torch.bfloat16) cast the state"
    )
    fresh, restored = _state(bench.make()), bench.make()
    restored.load_state_dict(balancer.state_dict())
    bench.expect(
        _same(_state(bench.moved(restored, bench.tokens(16))), _state(bench.moved(balancer, bench.tokens(16)))),
        "the same step after save and load gives another state",
    )
    bench.expect(
        _same(_effect(bench, restored), _effect(bench, balancer)), "acts otherwise after save and load: unsaved state"
    )
    with torch.device("meta"):
        empty = bench.make()
    empty.to_empty(device="cpu")
    for buffer in empty.buffers():
        buffer.fill_(7)  # what is in empty memory is anybody's guess
    for module in empty.modules():
        if isinstance(module, Balancer):
            module.reset_parameters()
    bench.expect(_same(fresh, _state(empty)), "reset_parameters() after to_empty() is not the starting state")


def check_extremes(bench: _Bench) -> None:
    """One token, one favoured expert, huge logits and pure padding stay finite."""
    one_expert = bench.tokens(1).expand(16, -1)
    cases = {"one token": bench.tokens(1), "identical tokens": one_expert, "huge logits": bench.tokens(16) * 1e3}
    for name, batch in cases.items():
        _check_finite(bench, name, batch, None)
    _check_finite(bench, "only padding", bench.tokens(5), torch.zeros(5, dtype=torch.bool))


def _check_finite(bench: _Bench, name: str, batch: Tensor, mask: Tensor | None) -> None:
    balancer = bench.make()
    router = bench.router(balancer)
    routing = router(batch, mask)
    loss = _loss(balancer, routing) + routing.weights.sum()
    grad = bench.gradient(loss, router)
    bench.expect(bool(loss.isfinite()) and bool(grad.isfinite().all()), f"{name}: loss or gradient is not finite")
    bench.moved(balancer, batch, mask=mask)
    bench.expect(all(bool(v.isfinite().all()) for v in _state(balancer).values()), f"{name}: state is not finite")


CHECKS = (
    check_forward_writes_nothing,
    check_losses,
    check_padding,
    check_step,
    check_state,
    check_extremes,
)


def check_balancer(
    make: Callable[[], Balancer],
    *,
    num_experts: int = 8,
    top_k: int = 2,
    num_groups: int | None = None,
    score: str = "softmax",
    gate: MakeGate = Gate,
) -> None:
    """Run every check on balancers that `make` builds.

    Args:
        make: no arguments → a fresh balancer for `num_experts` experts.
        num_experts: E.
        top_k: K.
        num_groups: route with top-k' per group over this many groups; None routes over all experts.
        score: `softmax` or `sigmoid`.
        gate: (D, E) → the router's gate; one with a method `noise_std` for a balancer that needs noise.

    Raises:
        AssertionError: the first contract that does not hold, with the balancer's name.

    >>> from himoe.balance import Switch
    >>> check_balancer(lambda: Switch(weight=0.01))
    """
    for check in CHECKS:
        check(_Bench(make, num_experts, top_k, num_groups, score, gate))
