"""What every gate must satisfy, as one call: `check_gate(MyGate)`, or `check_gate(partial(MyGate, option=…))`.

Each check is a function below; together they say what a `Router` relies on.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from himoe.functional.selection import top_k
from himoe.nn import Router

MakeGate = Callable[[int, int], nn.Module]


class _Bench:
    """Fresh gates of one kind, and tokens for them."""

    def __init__(self, make: MakeGate, dim: int, num_experts: int) -> None:
        self._make, self.dim, self.num_experts = make, dim, num_experts
        self.name = type(self.make()).__name__

    def make(self) -> nn.Module:
        """Return a gate that begins as it always does, without moving the random generator."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self._make(self.dim, self.num_experts)

    def drawn(self) -> nn.Module:
        """Return a gate with every parameter away from its start, which may be 0."""
        gate, generator = self.make(), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        return gate

    def tokens(self, count: int = 13, seed: int = 0) -> Tensor:
        return torch.randn(count, self.dim, generator=torch.Generator().manual_seed(seed))

    def outputs(self, gate: nn.Module, x: Tensor) -> dict[str, Tensor]:
        """Return the logits and, of a noisy gate, the standard deviation of the noise."""
        found = {"logits": gate(x)}
        if hasattr(gate, "noise_std"):
            found["noise_std"] = gate.noise_std(x)  # type: ignore[operator]
        return found

    def expect(self, condition: bool, text: str) -> None:
        if not condition:
            raise AssertionError(f"{self.name}: {text}")


def check_shapes(bench: _Bench) -> None:
    """(T, E) for any number of tokens, none included."""
    gate = bench.drawn()
    for count in (13, 1, 0):
        for name, value in bench.outputs(gate, bench.tokens(count)).items():
            expected = (count, bench.num_experts)
            bench.expect(tuple(value.shape) == expected, f"{name} is {tuple(value.shape)}, must be {expected}")


def check_precision(bench: _Bench) -> None:
    """At least fp32 whatever the autocast and the tokens' dtype, fp64 for fp64."""
    gate, x = bench.drawn(), bench.tokens()
    plain = bench.outputs(gate, x)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = bench.outputs(gate, x)
    for name, value in plain.items():
        bench.expect(value.dtype == torch.float32, f"{name} is {value.dtype} for fp32 tokens")
        found = under_autocast[name]
        bench.expect(
            found.dtype == torch.float32 and torch.equal(found, value), f"autocast reaches {name}: compute it without"
        )
    for name, value in bench.outputs(bench.drawn().to(torch.bfloat16), x.to(torch.bfloat16)).items():
        bench.expect(value.dtype == torch.float32, f"{name} is {value.dtype} in a bf16 model, must be fp32")
    for name, value in bench.outputs(bench.drawn().double(), x.double()).items():
        bench.expect(value.dtype == torch.float64, f"{name} is {value.dtype} in an fp64 model")
        bench.expect(torch.allclose(value, plain[name].double(), atol=1e-4, rtol=1e-3), f"{name} differs in fp64")


def check_gradients(bench: _Bench) -> None:
    """Gradients reach every parameter and the tokens, some from the start on, and are finite, for odd tokens too."""
    cases = {"tokens": bench.tokens(), "huge tokens": bench.tokens() * 1e4, "tokens of zeros": bench.tokens() * 0}
    for case, x in cases.items():
        for start, gate in ((True, bench.make()), (False, bench.drawn())):
            tokens = x.clone().requires_grad_()
            values = bench.outputs(gate, tokens)
            for name, value in values.items():
                bench.expect(bool(value.isfinite().all()), f"{case}: {name} is not finite")
            generator = torch.Generator().manual_seed(2)
            torch.stack(
                [(v * torch.randn(v.shape, generator=generator)).sum() for v in values.values()]
            ).sum().backward()
            trained = {name: parameter for name, parameter in gate.named_parameters() if parameter.requires_grad}
            moves = any(p.grad is not None and bool((p.grad != 0).any()) for p in trained.values())
            bench.expect(moves or case != "tokens" or not trained, f"{case}: no gradient reaches any parameter")
            for name, parameter in [*trained.items(), ("the tokens", tokens)]:
                grad = parameter.grad
                # a last layer of zeros keeps the others' gradients at 0 at first
                anywhere = start or case != "tokens" or parameter is tokens
                reached = grad is not None and (anywhere or bool((grad != 0).any()))
                bench.expect(reached, f"{case}: no gradient reaches {name}")
                bench.expect(
                    grad is None or bool(grad.isfinite().all()), f"{case}: the gradient of {name} is not finite"
                )


def check_every_expert(bench: _Bench) -> None:
    """Every expert's logits have a gradient of their own, where anything of the gate is trained."""
    gate = bench.drawn()
    parameters = [parameter for parameter in gate.parameters() if parameter.requires_grad]
    for expert, logits in enumerate(gate(bench.tokens()).unbind(-1) if parameters else ()):
        grads = [None]
        if logits.requires_grad:
            grads = torch.autograd.grad(logits.square().sum(), parameters, retain_graph=True, allow_unused=True)
        learned = any(grad is not None and bool((grad != 0).any()) for grad in grads)
        bench.expect(learned, f"no gradient reaches any parameter from the logits of expert {expert}")


def check_rows(bench: _Bench) -> None:
    """A token's logits depend on that token alone, so padding and the rest of the batch change nothing."""
    gate, x = bench.drawn(), bench.tokens()
    others = x.clone()
    others[1::2] = 1e3
    for training in (True, False):
        gate.train(training)
        whole, among = bench.outputs(gate, x), bench.outputs(gate, others)
        alone = bench.outputs(gate, x[4:5])
        for name, value in whole.items():
            same = torch.allclose(value[::2], among[name][::2], atol=1e-5, rtol=1e-5)
            same = same and torch.allclose(value[4:5], alone[name], atol=1e-5, rtol=1e-5)
            bench.expect(same, f"{name} of a token depends on other tokens")


def check_noise(bench: _Bench) -> None:
    """The logits themselves are never noisy; noise comes through `noise_std` and the router, in training only."""
    gate, x = bench.drawn(), bench.tokens()
    router = Router(gate, partial(top_k, k=2), num_experts=bench.num_experts)
    with torch.random.fork_rng(devices=[]):
        for training in (True, False):
            router.train(training)
            torch.manual_seed(1)
            one, routing = gate(x), router(x)
            torch.manual_seed(2)
            bench.expect(
                torch.equal(one, gate(x)), "the logits are drawn at random; noise belongs into a method noise_std"
            )
            bench.expect(torch.equal(one, routing.logits), "the routing holds other logits than the gate gives")
            noise, noisy = routing.context.noise, training and hasattr(gate, "noise_std")
            bench.expect((noise is not None) == noisy, "there is noise in eval, or none in training")
    std = bench.outputs(gate, x).get("noise_std")
    bench.expect(std is None or bool((std >= 0).all()), "noise_std is negative")
    modes = [gate.train(training)(x) for training in (True, False)]
    bench.expect(torch.equal(*modes), "the logits differ between training and eval")


def check_reset(bench: _Bench) -> None:
    """`reset_parameters` gives a model that was built on the meta device its start."""
    with torch.device("meta"):
        empty = bench.make()
    empty.to_empty(device="cpu")

    def reset() -> nn.Module:
        with torch.no_grad():
            for tensor in (*empty.parameters(), *empty.buffers()):
                tensor.fill_(77)  # what is in empty memory is anybody's guess
        for module in empty.modules():
            if callable(draw := getattr(module, "reset_parameters", None)):
                draw()
        return empty

    expected, found = _sizes(bench.make), _sizes(reset)
    for name, size in found.items():
        bench.expect(
            expected[name] / 2 <= size <= 2 * expected[name],
            f"reset_parameters() after to_empty() does not bring {name} back to the size it starts with",
        )


def _sizes(draw: Callable[[], nn.Module], draws: int = 16) -> dict[str, float]:
    """Return the root mean square of all that a gate holds, over several draws: one of few numbers says little."""
    squares: dict[str, float] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for _ in range(draws):
            for name, tensor in draw().state_dict().items():
                squares[name] = squares.get(name, 0.0) + tensor.float().square().mean().item() / draws
    return {name: square**0.5 for name, square in squares.items()}


def check_compiles(bench: _Bench) -> None:
    """Compiles as one graph, hence reads nothing back to the host."""
    gate, x = bench.drawn(), bench.tokens()
    torch.compiler.reset()
    for name, value in bench.outputs(gate, x).items():
        function = gate if name == "logits" else gate.noise_std
        try:
            found = torch.compile(function, fullgraph=True, backend="eager")(x)  # type: ignore[arg-type]
        except Exception as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise AssertionError(f"{bench.name}: {name} does not compile as one graph: {first}") from error
        bench.expect(torch.allclose(found, value), f"{name} differs when compiled")


CHECKS = (
    check_shapes,
    check_noise,
    check_precision,
    check_gradients,
    check_every_expert,
    check_rows,
    check_reset,
    check_compiles,
)


def check_gate(make: MakeGate, *, dim: int = 12, num_experts: int = 8) -> None:
    """Run every check on gates that `make` builds.

    Args:
        make: (dim, num_experts) → module, (T, D) → logits (T, E); a class whose options are bound will do.
        dim: D.
        num_experts: E.

    Raises:
        AssertionError: the first contract that does not hold, with the gate's name.

    >>> from himoe.nn import Gate
    >>> check_gate(Gate)
    """
    for check in CHECKS:
        check(_Bench(make, dim, num_experts))
