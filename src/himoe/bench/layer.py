"""The expert layer, forward and backward, against its peers: first whether it is right, then how long and how large.

A row is one shape, dtype and routing. Everyone computes the same problem in the same process; whoever gives a wrong
output or gradient is reported and not timed. All routings of a shape are timed in turns too, so that what skew costs
is not what an hour costs. Ratios are the peer's time over ours, from the fastest repeat of each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from himoe.bench import memory, right
from himoe.bench.clock import Times, race
from himoe.bench.contestant import CannotRunError, Contestant
from himoe.bench.peers import PEERS, Peer
from himoe.bench.problem import Choice, Problem, answer, make_problem, reroute
from himoe.bench.ratios import ratios
from himoe.bench.shapes import Shape
from himoe.errors import ConfigError
from himoe.kernels import backend_status, choose_backend, expert_mlp

QUICK_SECONDS = 4.0
"""With `quick`, whoever takes longer for one step is not timed."""


@dataclass
class Settings:
    """How to measure.

    Attributes:
        backends: of our own.
        peers: names of `PEERS`.
        seconds: of timing for one row, shared by all who take part; rows that are timed together share theirs.
        device: "cpu" or "cuda".
        backend: which of our own a row is about: "auto", what the layer chooses by itself, or a name.
        quick: leave out peers that take long.
        seed: decides the problems.
        known: the peers to choose from.
    """

    backends: Sequence[str]
    peers: Sequence[str]
    seconds: float
    device: str = "cpu"
    backend: str = "auto"
    quick: bool = False
    seed: int = 0
    known: Mapping[str, Peer] = field(default_factory=lambda: PEERS)


@dataclass
class _Field:
    """Who takes part in one row, and why the others do not."""

    ready: dict[str, Contestant] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


def ours(problem: Problem, backend: str) -> Contestant:
    """Return our kernel; raises CannotRunError where another backend would run in its place."""
    if reason := backend_status()[backend]:
        raise CannotRunError(reason)
    chosen = choose_backend(backend, problem.x, problem.up_proj, problem.down_proj)
    if chosen != backend:
        raise CannotRunError(f"does not take this shape, dtype or device; {chosen} would run")
    arguments = (problem.x, problem.expert_ids, problem.weights, problem.kept, problem.up_proj, problem.down_proj)
    return Contestant(problem, partial(expert_mlp, *arguments, backend=backend))


def measure(
    shape: Shape,
    dtype: str,
    routings: Mapping[str, Choice | None],
    settings: Settings,
    *,
    say: Callable[[str], object] = lambda _: None,
) -> list[dict[str, Any]]:
    """Return a row for every routing, see docs/benchmarks.md.

    Args:
        shape: sizes.
        dtype: "fp32" or "bf16".
        routings: names of `problem.ROUTINGS`, with who goes where for `real`.
        settings: who and how.
        say: told what is being done.
    """
    (first, given), *others = ((routing, choice or routing) for routing, choice in routings.items())
    problem = make_problem(shape, dtype, given, device=settings.device, seed=settings.seed)
    problems = {first: problem, **{name: reroute(problem, other, seed=settings.seed) for name, other in others}}
    fields = {
        routing: _gate(problem, settings, lambda what, routing=routing: say(f"{routing} · {what}"))
        for routing, problem in problems.items()
    }
    facts = {routing: _facts(field, settings.device) for routing, field in fields.items()}
    say("timing")
    ready = {f"{routing} {name}": one for routing, field in fields.items() for name, one in field.ready.items()}
    times = race(
        {name: one.step for name, one in ready.items()},
        settings.seconds * len(problems),
        device=settings.device,
        between=lambda _: [one.clear() for one in ready.values()],
    )
    return [
        _row(
            problem,
            routing,
            {name: times[f"{routing} {name}"] for name in fields[routing].ready},
            facts[routing],
            fields[routing],
            settings,
        )
        for routing, problem in problems.items()
    ]


def _facts(field: _Field, device: str) -> dict[str, dict[str, float]]:
    """Return memory and error of everybody who is right."""
    return {name: {**_memory(one, device), "error": field.errors[name]} for name, one in field.ready.items()}


def _row(
    problem: Problem,
    routing: str,
    times: Mapping[str, Times],
    facts: Mapping[str, Any],
    field: _Field,
    settings: Settings,
) -> dict[str, Any]:
    shape, own = problem.shape, settings.backend
    if own == "auto":
        own = choose_backend("auto", problem.x, problem.up_proj, problem.down_proj)
    backends = {name: _compare(name, times, facts, settings) for name in settings.backends if name in times}
    return {
        "shape": shape.record(),
        "dtype": problem.dtype,
        "routing": routing,
        "backend": own,
        **backends.get(own, {"ratio_vs": {}}),
        "backends": backends,
        "times": {name: {**_times(one, shape), **facts[name]} for name, one in times.items()},
        "largest_load": _largest_load(problem),
        "not_run": field.not_run,
        "failed": field.failed,
    }


def _gate(problem: Problem, settings: Settings, say: Callable[[str], object]) -> _Field:
    """Let everyone solve the problem once, and compare; only who is right gets ready."""
    field = _Field()
    builders: dict[str, Callable[[], Contestant]] = {name: partial(ours, problem, name) for name in settings.backends}
    for name in settings.peers:
        peer = settings.known[name]
        if problem.dtype not in peer.dtypes:
            field.not_run[name] = f"takes {' and '.join(peer.dtypes)} only"
        elif reason := peer.missing(settings.device):
            field.not_run[name] = reason
        else:
            builders[name] = partial(peer.build, problem)
    say("the right answer, in fp64")
    expected = answer(problem)
    for name, build in builders.items():
        say(f"checking {name}")
        try:
            contestant = build()
            started = perf_counter()
            results = contestant.results()
            seconds = perf_counter() - started
            _check(
                name,
                contestant,
                results,
                expected if contestant.problem is problem else answer(contestant.problem),
                field,
            )
        except (CannotRunError, ConfigError) as error:
            field.not_run[name] = str(error)
            continue
        except (RuntimeError, ImportError, AttributeError, TypeError, NotImplementedError, ValueError) as error:
            text = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
            (field.failed if name in settings.backends else field.not_run)[name] = text
            continue
        if settings.quick and name in settings.peers and settings.device == "cpu" and seconds > QUICK_SECONDS:
            field.not_run[name] = f"takes {seconds:.0f} s a step; --quick leaves it out"
            field.ready.pop(name, None)
    return field


def _check(
    name: str, contestant: Contestant, results: Mapping[str, Tensor], expected: Mapping[str, Tensor], field: _Field
) -> None:
    """Compare a contestant's results with the answer."""
    errors = right.errors(results, _wanted(contestant, expected))
    contestant.clear()
    field.errors[name] = max(errors.values())
    if complaint := right.complaint(errors, contestant.problem.dtype):
        field.failed[name] = complaint
    else:
        field.ready[name] = contestant


def _wanted(contestant: Contestant, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the part of the answer that the contestant has: a dense network has no weights to learn."""
    wanted = {"y": expected["y"]}
    for name, leaf in contestant.leaves.items():
        if not isinstance(leaf, Tensor) or leaf.requires_grad:
            wanted[name] = expected[name]
    if contestant.normalizes:
        own = (expected["weights"] * contestant.problem.weights.detach()).sum(-1, keepdim=True)
        wanted["weights"] = expected["weights"] - own
    return wanted


def _memory(contestant: Contestant, device: str) -> dict[str, float]:
    """Return peak and saved MiB of a step."""
    contestant.clear()
    saved = memory.saved_bytes(contestant.forward, contestant.given())
    peak = memory.peak_bytes(contestant.step, device)
    contestant.clear()
    return {"peak_mib": peak / 2**20, "saved_mib": saved / 2**20}


def _compare(name: str, times: Mapping[str, Times], facts: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Return one backend's ratios to every peer, and the fraction of the dense network's speed."""
    peers = {peer: times[peer] for peer in settings.peers if peer in times}
    own = times[name]
    ratio_vs = ratios(own.minimum, {peer: one.minimum for peer, one in peers.items()})
    return {
        "ratio_vs": ratio_vs,
        "ratio_vs_median": ratios(own.median, {peer: one.median for peer, one in peers.items()}),
        "ratio_vs_cpu": ratios(own.cpu_minimum, {peer: one.cpu_minimum for peer, one in peers.items()}),
        "fraction_of_dense": ratio_vs.get("dense"),
        "saved_vs": {peer: facts[name]["saved_mib"] / facts[peer]["saved_mib"] for peer in peers},
        "peak_vs": {peer: facts[name]["peak_mib"] / facts[peer]["peak_mib"] for peer in peers},
    }


def _times(times: Times, shape: Shape) -> dict[str, float]:
    return {
        "minimum_ms": times.minimum * 1e3,
        "median_ms": times.median * 1e3,
        "cpu_ms": times.cpu_minimum * 1e3,
        "repeats": len(times.wall),
        "gflops": shape.flops / times.minimum / 1e9,
    }


def _largest_load(problem: Problem) -> float:
    """Return the largest load over the mean."""
    load = torch.bincount(problem.expert_ids.flatten(), minlength=problem.shape.num_experts)
    return (load.max() / load.double().mean()).item()
