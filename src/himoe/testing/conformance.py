"""What every balancer must satisfy, as one call: `check_balancer(lambda: MyBalancer(8), num_experts=8)`.

Each check is a function below; together they are the contract of `himoe.balance.base.Balancer`, all but one claim: that
`balances_load` evens out the load. Training shows that: `python -m himoe.testing.behaviour --only module:MyBalancer`.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from himoe.balance import Balancer, step_balancers
from himoe.nn import Gate
from himoe.testing.balancer_bench import NO_GRADIENT, Bench, MakeGate, effect_of, loss_of, same, state_of
from himoe.testing.balancer_forward import (
    check_causality,
    check_compiles,
    check_no_tokens,
    check_stays_on_device,
    check_sums,
)


def check_forward_writes_nothing(bench: Bench) -> None:
    """Routing and losses, in training and in eval, leave state, sums and their own input untouched."""
    balancer = bench.moved(bench.make(), bench.tokens(32))
    before = state_of(balancer)
    router = bench.router(balancer)
    for training in (True, False):
        routing = router.train(training)(bench.tokens(20, seed=1))
        balancer.losses(routing)
        for hook, values in ((balancer.adjust_logits, routing.logits), (balancer.adjust_choice, routing.scores)):
            given = values.detach().clone()
            hook(given, routing.context)
            bench.expect(torch.equal(given, values), f"{hook.__name__}() changed its input in place")
    bench.expect(same(before, state_of(balancer)), "a forward pass or losses() changed the state")
    bench.expect(not any(m.sums for m in balancer.modules() if isinstance(m, Balancer)), "a forward pass observed")


def check_losses(bench: Bench) -> None:
    """Losses are finite scalars, at least fp32, and train the gate where there are any that are not 0."""
    router = bench.router(bench.moved(bench.make(), bench.tokens(32)))
    with torch.no_grad():
        for parameter in router.gate.parameters():  # a gate of zeros, as some start, is where losses may rest
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    routing = router(bench.tokens(20))
    bench.expect(bool(bench.gradient(routing.scores.square().sum(), router).any()), NO_GRADIENT)
    named = router.balancer.losses(routing)
    for name, value in named.items():
        bench.expect(value.shape == () and bool(value.isfinite()), f"loss {name} is not a finite scalar: {value}")
        bench.expect(value.dtype in (torch.float32, torch.float64), f"loss {name} is {value.dtype}, not fp32")
    unsaid = ", ".join(set(named) - set(router.balancer.loss_names)) if router.balancer.loss_names else ""
    bench.expect(not unsaid, f"loss_names leaves out {unsaid}")
    total = loss_of(router.balancer, routing)
    if named:
        bench.expect(total.requires_grad, "the losses carry no gradient, so they train nothing")
        grad = bench.gradient(total, router)
        bench.expect(bool(grad.isfinite().all()), "a loss gives the gate a gradient that is not finite")
        trains = bool((total == 0) | grad.any())  # a loss that is off, its weight 0, has no gradient
        bench.expect(trains, "the losses are not 0 and the gate's gradient is, so they train nothing")


def check_padding(bench: Bench) -> None:
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
        loss = loss_of(balancer, routing) + (routing.weights**2).sum()
        grad = bench.gradient(loss, router)
        with torch.no_grad():
            balancer.observe(routing)
        step_balancers([balancer])
        rows = slice(None) if m is None else m
        results.append((routing.expert_ids[rows], routing.weights[rows], loss, grad, state_of(balancer)))
    (ids, weights, loss, grad, state), (ids_p, weights_p, loss_p, grad_p, state_p) = results
    bench.expect(torch.equal(ids, ids_p) and torch.allclose(weights, weights_p), "padding changed the routing")
    bench.expect(torch.allclose(loss, loss_p, rtol=1e-5, atol=1e-7), f"padding changed the losses: {loss} → {loss_p}")
    bench.expect(torch.allclose(grad, grad_p, rtol=1e-4, atol=1e-6), "padding changed the gate's gradient")
    bench.expect(same(state, state_p, 1e-6), "padding changed the state")


def check_kept(bench: Bench) -> None:
    """Losses and state follow what was selected, whichever of these pairs a dispatcher then keeps."""
    results = []
    for thinned in (False, True):
        balancer = bench.moved(bench.make(), bench.tokens(32, seed=3))
        routing = bench.router(balancer)(bench.tokens(20))
        if thinned:
            routing = replace(routing, kept=routing.selected & (routing.expert_ids < bench.num_experts // 2))
        loss = loss_of(balancer, routing).detach()
        with torch.no_grad():
            balancer.observe(routing)
        step_balancers([balancer])
        results.append((loss, state_of(balancer)))
    (loss, state), (loss_kept, state_kept) = results
    alike = torch.allclose(loss, loss_kept, rtol=1e-5, atol=1e-7)
    bench.expect(alike, "dropped pairs change the losses: they must follow `selected`, not `kept`")
    bench.expect(same(state, state_kept, 1e-6), "dropped pairs change the state: it must follow `selected`, not `kept`")


def check_step(bench: Bench) -> None:
    """Only `step` moves the state; micro-batches add up to one batch; padding alone does what no batch does.

    A step without an observation may move state, as counts of steps do, but no further after pure padding.
    """
    balancer, batch = bench.make(), bench.tokens(32)
    before = state_of(balancer)
    with torch.no_grad():
        balancer.observe(bench.router(balancer)(batch))
    bench.expect(same(before, state_of(balancer)), "observe() moved the state")
    whole = state_of(bench.moved(bench.make(), batch))
    parts = state_of(bench.moved(bench.make(), *batch.split([17, 12, 3])))
    bench.expect(same(whole, parts, 1e-6), "three micro-batches move the state elsewhere than one whole batch")
    nothing = bench.tokens(4)
    none = torch.zeros(4, dtype=torch.bool)
    only_padding = bench.moved(bench.make(), nothing, mask=none)
    no_batch = bench.moved(bench.make())
    bench.expect(same(state_of(only_padding), state_of(no_batch), 1e-6), "a step that saw only padding moved the state")


def check_state(bench: Bench) -> None:
    """State has no parameters, moves in place, keeps fp32 in a bf16 model, is saved, and can be reset."""
    balancer = bench.make()
    bench.expect(not list(balancer.parameters()), "state must be buffers; parameters would be given to the optimizer")
    addresses = {name: buffer.data_ptr() for name, buffer in balancer.named_buffers()}
    bench.moved(balancer, bench.tokens(32))
    moved_to = {name: buffer.data_ptr() for name, buffer in balancer.named_buffers()}
    bench.expect(addresses == moved_to, "step() replaced a buffer instead of moving it in place")
    before = state_of(balancer)
    balancer.to(torch.bfloat16)
    bench.expect(same(before, state_of(balancer)), ".to(torch.bfloat16) changed the state's values")
    bench.expect(
        all(b.dtype == before[n].dtype for n, b in balancer.named_buffers()), ".to(torch.bfloat16) cast the state"
    )
    fresh, restored = state_of(bench.make()), bench.make()
    restored.load_state_dict(balancer.state_dict())
    bench.expect(
        same(state_of(bench.moved(restored, bench.tokens(16))), state_of(bench.moved(balancer, bench.tokens(16)))),
        "the same step after save and load gives another state",
    )
    bench.expect(
        same(effect_of(bench, restored), effect_of(bench, balancer)),
        "acts otherwise after save and load: unsaved state",
    )
    with torch.device("meta"):
        empty = bench.make()
    empty.to_empty(device="cpu")
    for buffer in empty.buffers():
        buffer.fill_(7)  # what is in empty memory is anybody's guess
    for module in empty.modules():
        if isinstance(module, Balancer):
            module.reset_parameters()
    bench.expect(same(fresh, state_of(empty)), "reset_parameters() after to_empty() is not the starting state")


def check_extremes(bench: Bench) -> None:
    """One token, one favoured expert, huge logits and pure padding stay finite."""
    one_expert = bench.tokens(1).expand(16, -1)
    cases = {"one token": bench.tokens(1), "identical tokens": one_expert, "huge logits": bench.tokens(16) * 1e3}
    for name, batch in cases.items():
        _check_finite(bench, name, batch, None)
    _check_finite(bench, "only padding", bench.tokens(5), torch.zeros(5, dtype=torch.bool))


def _check_finite(bench: Bench, name: str, batch: Tensor, mask: Tensor | None) -> None:
    balancer = bench.make()
    router = bench.router(balancer)
    routing = router(batch, mask)
    loss = loss_of(balancer, routing) + routing.weights.sum()
    grad = bench.gradient(loss, router)
    bench.expect(bool(loss.isfinite()) and bool(grad.isfinite().all()), f"{name}: loss or gradient is not finite")
    bench.moved(balancer, batch, mask=mask)
    bench.expect(all(bool(v.isfinite().all()) for v in state_of(balancer).values()), f"{name}: state is not finite")


CHECKS = (
    check_forward_writes_nothing,
    check_losses,
    check_padding,
    check_kept,
    check_step,
    check_sums,
    check_no_tokens,
    check_state,
    check_extremes,
    check_causality,
    check_stays_on_device,
)


def check_balancer(
    make: Callable[[], Balancer],
    *,
    num_experts: int = 8,
    top_k: int = 2,
    num_groups: int | None = None,
    score: str = "softmax",
    gate: MakeGate = Gate,
    compiles: bool = True,
) -> None:
    """Run every check on balancers that `make` builds.

    Args:
        make: no arguments → a fresh balancer for `num_experts` experts.
        num_experts: E.
        top_k: K.
        num_groups: route with top-k' per group over this many groups; None routes over all experts.
        score: `softmax` or `sigmoid`.
        gate: (D, E) → the router's gate; one with a method `noise_std` for a balancer that needs noise.
        compiles: False leaves the check out that compiles every hook, which takes most of the time: once for each piece
            of code is enough, whatever the options.

    Raises:
        AssertionError: the first contract that does not hold, with the balancer's name.

    >>> from himoe.balance import Switch
    >>> check_balancer(lambda: Switch(weight=0.01))
    """
    for check in (*CHECKS, check_compiles) if compiles else CHECKS:
        check(Bench(make, num_experts, top_k, num_groups, score, gate))
