"""What `check_balancer` measures with: a router around a fresh balancer, batches for it, and what the balancer did."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from himoe.balance import Balancer, step_balancers
from himoe.functional import scores as score_functions
from himoe.functional.groups import Groups
from himoe.functional.selection import top_k as select_top_k
from himoe.functional.selection import top_k_per_group
from himoe.nn import Router
from himoe.types import Routing

WIDTH = 6


MakeGate = Callable[[int, int], nn.Module]
NO_GRADIENT = "no gradient reaches the gate: adjust_logits() must not detach"
NOISE_LEVELS = 1000003  # a prime


class _SteadyNoise(Router):
    """A router whose noise is a function of the token, so that a batch may be padded or cut and is the same batch."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:  # type: ignore[override]
        self._bits = x[:, :1].contiguous().view(torch.int32).to(torch.int64)
        return super().forward(x, mask)

    def standard_noise(self, like: Tensor, mask: Tensor | None) -> Tensor:  # noqa: ARG002
        column = torch.arange(like.shape[-1]) * 7919 + 104729
        level = (self._bits % NOISE_LEVELS * column) % NOISE_LEVELS  # some number, evenly spread
        return (2**0.5 * torch.erfinv((2.0 * level + 1) / NOISE_LEVELS - 1)).to(like.dtype)


class Bench:
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
        """Return a router that begins as it always does."""
        torch.manual_seed(1)
        return _SteadyNoise(
            self.make_gate(WIDTH, self.num_experts),
            self.selector,
            num_experts=self.num_experts,
            score=self.score,
            balancer=balancer,
        )

    def tokens(self, count: int, seed: int = 0) -> Tensor:
        """Return tokens (count, D) that favour some experts."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, WIDTH, generator=generator) + 0.5  # a common offset: some experts are favoured

    def no_tokens(self) -> Routing:
        """Return what `himoe.step` lets a layer observe that did not run on this rank."""
        routing = self.router(Balancer())(self.tokens(0))
        return replace(routing, context=replace(routing.context, gate_weight=None))

    def moved(self, balancer: Balancer, *batches: Tensor, mask: Tensor | None = None) -> Balancer:
        """Run one optimizer step over micro-batches."""
        router = self.router(balancer)
        with torch.no_grad():
            for batch in batches:
                balancer.observe(router(batch, mask))
        step_balancers([balancer])
        return balancer

    def gradient(self, loss: Tensor, router: Router) -> Tensor:
        """Return the gradient of all of the gate's parameters, as one vector."""
        self.expect(loss.requires_grad, NO_GRADIENT)
        parameters = list(router.gate.parameters())
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True, retain_graph=True)
        return torch.cat([grad.flatten() for grad in grads])

    def expect(self, condition: bool, text: str) -> None:
        """Raise AssertionError, with the balancer's name, unless the condition holds."""
        if not condition:
            raise AssertionError(f"{self.name}: {text}")


def state_of(balancer: Balancer) -> dict[str, Tensor]:
    """Return copies of all buffers."""
    return {name: value.clone() for name, value in balancer.named_buffers()}


def effect_of(bench: Bench, balancer: Balancer) -> dict[str, Tensor]:
    """What the balancer does to a fixed batch."""
    routing = bench.router(balancer)(bench.tokens(16, seed=5))
    return {
        "logits": balancer.adjust_logits(routing.logits, routing.context),
        "choice": balancer.adjust_choice(routing.scores, routing.context),
        "loss": loss_of(balancer, routing),
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> bool:
    """True where both hold the same names with values within the tolerance."""
    return one.keys() == other.keys() and all(
        torch.allclose(one[n].double(), other[n].double(), rtol=0, atol=tolerance) for n in one
    )


def loss_of(balancer: Balancer, routing: Routing) -> Tensor:
    """Return the sum of the losses."""
    return sum(balancer.losses(routing).values(), start=torch.zeros(()))
