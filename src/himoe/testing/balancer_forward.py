"""Checks of `check_balancer` on what a balancer may look at: later tokens, the host, sums that other ranks add to."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from himoe.balance import Balancer, step_balancers
from himoe.testing.balancer_bench import Bench, same, state_of
from himoe.types import RouterContext, Routing

LENGTH = 21
_SIZE_FROM_DATA = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount")
_TO_HOST = ("_local_scalar_dense", "equal")


class _StaysOnDevice(TorchDispatchMode):
    """Notes the first operation that reads a value back to the host, or whose result's size is in the data."""

    found: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in _TO_HOST:
            self.found = self.found or "a value is read back to the host"
        elif name in _SIZE_FROM_DATA or (name.startswith("index") and _by_bools(args)):
            self.found = self.found or f"the size of a tensor depends on values ({name})"
        return func(*args, **(kwargs or {}))


def _by_bools(args: tuple[Any, ...]) -> bool:
    places = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(isinstance(place, Tensor) and place.dtype == torch.bool for place in places)


def _batch(bench: Bench, balancer: Balancer, x: Tensor, training: bool) -> Routing:
    """Route tokens whose words are all different."""
    routing = bench.router(balancer).train(training)(x)
    return replace(routing, context=replace(routing.context, token_ids=torch.arange(x.shape[0])))


def check_causality(bench: Bench) -> None:
    """Later tokens change no earlier row of adjust_logits and adjust_choice, unless `causal = False` admits it."""
    balancer = bench.moved(bench.make(), bench.tokens(32))
    if not all(part.causal for part in balancer.modules() if isinstance(part, Balancer)):
        return
    tokens, others = bench.tokens(LENGTH), -3 * bench.tokens(LENGTH, seed=8)
    for training in (True, False):
        whole = _batch(bench, balancer, tokens, training)
        for cut in range(1, LENGTH, 4):
            changed = _batch(bench, balancer, torch.cat([tokens[:cut], others[cut:]]), training)
            for name, values in (("adjust_logits", "logits"), ("adjust_choice", "scores")):
                hook = getattr(balancer, name)
                before = getattr(whole, values).detach()
                after = torch.cat([before[:cut], getattr(changed, values).detach()[cut:]])
                one, other = hook(before, whole.context)[:cut], hook(after, changed.context)[:cut]
                alike = torch.allclose(one, other, rtol=1e-6, atol=1e-7)
                bench.expect(alike, f"later tokens change {name}() of earlier ones: set causal = False, or mend it")


def check_sums(bench: Bench) -> None:
    """What `observe` collects is int64 or fp64 and lives in `sums` alone, where other ranks add theirs."""
    balancer = bench.make()
    with torch.no_grad():
        balancer.observe(bench.router(balancer)(bench.tokens(32)))
        parts = [part for part in balancer.modules() if isinstance(part, Balancer)]
        for name, value in ((name, value) for part in parts for name, value in part.sums.items()):
            exact = value.dtype in (torch.int64, torch.float64)
            bench.expect(exact, f"observe() sums {name} in {value.dtype}, must be torch.int64 or torch.float64")
        for part in parts:
            part.sums.clear()
        balancer.step()
    kept = "step() uses what observe() kept outside accumulate(), where no other rank adds its own"
    bench.expect(same(state_of(balancer), state_of(bench.moved(bench.make())), 1e-9), kept)


def check_no_tokens(bench: Bench) -> None:
    """A layer that did not run on this rank observes no tokens: the same sums, for all ranks to add up, and no move."""
    some, none = bench.make(), bench.make()
    with torch.no_grad():
        some.observe(bench.router(some)(bench.tokens(32)))
        try:
            none.observe(bench.no_tokens())
        except Exception as error:
            text = f"{bench.name}: observe() of no tokens fails with {type(error).__name__}: {error}"
            raise AssertionError(text) from error
    one, other = _sums(some), _sums(none)
    bench.expect(one == other, f"observe() sums {other or 'nothing'} for no tokens and {one} for some: must be alike")
    step_balancers([none])
    unmoved = same(state_of(none), state_of(bench.moved(bench.make())), 1e-6)
    bench.expect(unmoved, "a step that saw no tokens moved the state")


def _sums(balancer: Balancer) -> str:
    """Describe the sums of all parts, in the order in which ranks add them up."""
    parts = [part for part in balancer.modules() if isinstance(part, Balancer)]
    named = [(name, part.sums[name]) for part in parts for name in sorted(part.sums)]
    return ", ".join(f"{name} {tuple(value.shape)} {value.dtype}" for name, value in named)


class _Hooks:
    """The hooks of a micro-batch as functions of tensors, and tensors for them."""

    def __init__(self, bench: Bench) -> None:
        self.balancer = bench.moved(bench.make(), bench.tokens(32))
        self.routing = _batch(bench, self.balancer, bench.tokens(LENGTH), training=True)
        self.all = (self.adjust_logits, self.adjust_choice, self.losses, self.observe)
        real = (torch.arange(LENGTH) % 5 != 0)[:, None] & self.routing.selected
        self.given = (self.routing.logits.detach(), self.routing.scores.detach(), real)

    def _rebuilt(self, logits: Tensor, scores: Tensor, selected: Tensor) -> Routing:
        context: RouterContext = replace(self.routing.context, mask=selected.any(-1))
        changed = {"logits": logits, "scores": scores, "selected": selected, "kept": selected, "context": context}
        return replace(self.routing, **changed, counts=None)

    def adjust_logits(self, *given: Tensor) -> dict[str, Tensor]:
        return {"": self.balancer.adjust_logits(given[0], self._rebuilt(*given).context)}

    def adjust_choice(self, *given: Tensor) -> dict[str, Tensor]:
        return {"": self.balancer.adjust_choice(given[1], self._rebuilt(*given).context)}

    def losses(self, *given: Tensor) -> dict[str, Tensor]:
        return self.balancer.losses(self._rebuilt(*given))

    def observe(self, *given: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            self.balancer.observe(self._rebuilt(*given))
        parts = [part for part in self.balancer.modules() if isinstance(part, Balancer)]
        return {f"{i} {name}": value for i, part in enumerate(parts) for name, value in part.sums.items()}

    def clear(self) -> None:
        for part in self.balancer.modules():
            if isinstance(part, Balancer):
                part.sums.clear()


def check_stays_on_device(bench: Bench) -> None:
    """The hooks of a micro-batch read nothing back to the host."""
    hooks = _Hooks(bench)
    for hook in hooks.all:
        with _StaysOnDevice() as watch:
            hook(*hooks.given)
        bench.expect(watch.found is None, f"{hook.__name__}(): {watch.found}, for which a GPU waits")


def check_compiles(bench: Bench) -> None:
    """The hooks of a micro-batch compile as one graph, and give the same there."""
    hooks = _Hooks(bench)
    expected = [hook(*hooks.given) for hook in hooks.all]
    hooks.clear()

    def all_hooks(*given: Tensor) -> list[dict[str, Tensor]]:
        return [hook(*given) for hook in hooks.all]

    try:
        found = _compiled(all_hooks)(*hooks.given)
    except Exception:
        for hook in hooks.all:
            hooks.clear()
            try:
                _compiled(hook)(*hooks.given)
            except Exception as error:
                first = next(iter(str(error).splitlines()), type(error).__name__)
                text = f"{bench.name}: {hook.__name__}() does not compile as one graph: {first}"
                raise AssertionError(text) from error
        raise
    for hook, one, other in zip(hooks.all, expected, found, strict=True):
        bench.expect(same(one, other, 1e-6), f"{hook.__name__}() gives something else when compiled")


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="eager")
