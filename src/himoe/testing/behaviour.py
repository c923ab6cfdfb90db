"""What every strategy does on a skewed toy: the load before and after, and what it costs the task.

    python -m himoe.testing.behaviour [--seeds 5] [--steps 300] [--only NAME … [--set KEY=VALUE …]] [--json]

NAME may be your own `"module:Class"` too; the command fails where a claim to balance does not hold.

The toy: tokens of eight kinds, each with a linear map of its own to learn, one coordinate that all tokens share, and a
gate that starts out favouring some experts along it. A layer of eight experts, two a token, learns it with one strategy
at a time. MaxVio is that of the selected pairs of 2,048 fresh tokens, in training mode, where balance is wanted; some
strategies choose otherwise in eval. Before is no balancing before the first step, since some are even from the start.
The task's loss is the squared error of these tokens over that of no balancing with the same seed. Weights and rates are
for some hundred steps: larger than a model's.
"""

import argparse
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import mean, stdev
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from himoe import registry
from himoe.balance import Balancer, step_balancers
from himoe.build.calling import construct, try_out
from himoe.build.router import renormalizes
from himoe.config.loading import parse_sets
from himoe.errors import ConfigError
from himoe.functional import stats
from himoe.functional.groups import Groups
from himoe.nn import MoE, Router, SwiGLUExperts

E, K, G, D, F = 8, 2, 4, 8, 16
BATCH, HELD_OUT = 128, 2048
HALVED = 0.5  # MaxVio after over before, of a strategy that balances

AROUND = registry.having("balancers", "goes_with")  # what a strategy is made to go with
FREE = ("replay",)  # selectors that have nothing to show here: their choice is given


@dataclass(frozen=True)
class Strategy:
    """One row: a balancer or a selector by name, with what stands around it, and its options."""

    table: str
    name: str
    claims: bool
    around: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def router(self) -> Router:
        """Build its router."""
        balancer = _call("balancers", self.name, self.options) if self.table == "balancers" else Balancer()
        if self.table == "selectors":
            selector = _bound("selectors", self.name, self.options)
        else:
            selector = _bound("selectors", self.around.get("selector", "top_k"))
        score = _bound("scores", self.around.get("score", "softmax"))
        return Router(
            _call("gates", self.around.get("gate", "linear")),
            selector,
            num_experts=E,
            score=score,
            balancer=balancer,
            renormalize=renormalizes(selector, score, K),
        )


NOTHING = Strategy("balancers", "none", claims=False)


@dataclass(frozen=True)
class Row:
    """What one strategy did, over all seeds: means, and standard deviations over seeds behind them."""

    table: str
    name: str
    claims_to_balance: bool
    max_vio_before: float
    max_vio_after: float
    max_vio_after_std: float
    max_vio_in_eval: float
    ratio: float
    task_loss: float
    task_loss_relative: float
    task_loss_relative_std: float


def strategies() -> list[Strategy]:
    """Return no balancing, every balancer, and every selector."""
    found = [NOTHING]
    for name in registry.BALANCERS:
        entry = registry.load("balancers", name)
        found.append(Strategy("balancers", name, entry.balances_load, AROUND.get(name, {}), dict(entry.toy_options)))
    for name in registry.SELECTORS:
        if name not in FREE:
            entry, around = registry.load("selectors", name), registry.fact("selectors", name, "goes_with", {})
            claims, options = getattr(entry, "balances_load", False), getattr(entry, "toy_options", {})
            found.append(Strategy("selectors", name, claims, around, options))
    return found


def own_strategy(name: str, options: dict[str, Any]) -> Strategy:
    """Return that of a reader's own `"module:Class"`, a balancer, or `"module:function"`, a selector.

    Raises:
        ConfigError: there is no such thing, or it cannot be built with these options.
    """
    thing = registry.load("balancers", name)
    claims = bool(getattr(thing, "balances_load", False))
    if inspect.isclass(thing):
        around = {"gate": "noisy"} if getattr(thing, "needs_noise", False) else {}
        strategy = Strategy("balancers", name, claims, around, options)
    else:
        strategy = Strategy("selectors", name, claims, options=options)
    try_out(construct(strategy.router, name), name, D)
    return strategy


def _layer() -> dict[str, Any]:
    return {"num_experts": E, "groups": Groups.equal(E, G), "top_k": K, "dim": D, "k": K, "max_k": E}


def _given(function: Any) -> dict[str, Any]:
    return {name: value for name, value in _layer().items() if name in inspect.signature(function).parameters}


def _call(table: str, name: str, options: Mapping[str, Any] = MappingProxyType({})) -> Any:
    if name == NOTHING.name:
        return Balancer()
    constructor = registry.load(table, name)
    return constructor(**_given(constructor), **options)


def _bound(table: str, name: str, options: Mapping[str, Any] = MappingProxyType({})) -> Callable[..., Any]:
    function = registry.load(table, name)
    given = _given(function)
    if name in registry.GROUPED_SELECTORS:
        given |= {"k": 1, "groups": Groups.equal(E, K)}  # one expert of each of K groups
    return partial(function, **{**given, **options})


class Toy:
    """Tokens of eight kinds and their targets."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.centres = 0.7 * torch.randn(E, D, generator=self.generator)
        self.maps = torch.randn(E, D, D, generator=self.generator) / D**0.5

    def batch(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens (4, count/4, D), their targets and their kinds (4, count/4): four sequences."""
        kinds = torch.randint(E, (count,), generator=self.generator)
        x = self.centres[kinds] + torch.randn(count, D, generator=self.generator)
        x[:, 0] = 1.0
        target = torch.einsum("td,tfd->tf", x, self.maps[kinds])
        return x.unflatten(0, (4, -1)), target.unflatten(0, (4, -1)), kinds.view(4, -1)


def run(strategy: Strategy, seed: int, steps: int) -> tuple[float, float, float]:
    """Train one layer from the skewed gate; return MaxVio in training and in eval mode, and the task's loss."""
    torch.manual_seed(seed)
    toy = Toy(seed)
    held_out = toy.batch(HELD_OUT)
    layer = MoE(strategy.router(), SwiGLUExperts(E, D, F))
    _skew(layer.router.gate)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        x, target, kinds = toy.batch(BATCH)
        y, routing = layer(x, token_ids=kinds)
        loss = (y - target).square().mean() + sum(layer.router.balancer.losses(routing).values())
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            layer.router.balancer.observe(routing)
        optimizer.step()
        step_balancers([layer.router.balancer])
    x, target, kinds = held_out
    with torch.no_grad():
        y, routing = layer(x, token_ids=kinds)
        _, routing_in_eval = layer.eval()(x, token_ids=kinds)
    vio, vio_in_eval = (stats.max_vio(stats.selected_load(one)).item() for one in (routing, routing_in_eval))
    return vio, vio_in_eval, (y - target).square().mean().item()


@torch.no_grad()
def _skew(gate: nn.Module) -> None:
    """Let the logits of a token differ by up to 6 along the coordinate that all tokens share."""
    favour = torch.linspace(3, -3, E)
    gate.weight[:, 0] += favour  # type: ignore[index]


def compare(chosen: Sequence[Strategy], seeds: int, steps: int, progress: Callable[[str], None]) -> list[Row]:
    """Run every strategy with every seed, and no balancing to compare with."""
    before = mean(run(NOTHING, seed, 0)[0] for seed in range(seeds))
    rows, reference = [], [run(NOTHING, seed, steps)[2] for seed in range(seeds)]
    for strategy in chosen:
        progress(strategy.name)
        results = [run(strategy, seed, steps) for seed in range(seeds)]
        after, in_eval, losses = zip(*results, strict=True)
        relative = [loss / other for loss, other in zip(losses, reference, strict=True)]
        rows.append(
            Row(
                table=strategy.table,
                name=strategy.name,
                claims_to_balance=strategy.claims,
                max_vio_before=before,
                max_vio_after=mean(after),
                max_vio_after_std=stdev(after) if seeds > 1 else 0.0,
                max_vio_in_eval=mean(in_eval),
                ratio=mean(after) / before,
                task_loss=mean(losses),
                task_loss_relative=mean(relative),
                task_loss_relative_std=stdev(relative) if seeds > 1 else 0.0,
            )
        )
    return rows


def table(rows: Sequence[Row]) -> Table:
    """Return the rows as a table for people."""
    result = Table("", "strategy", "claims", "before", "MaxVio", "/ before", "in eval", "task loss / none")
    for row in rows:
        result.add_row(
            row.table.removesuffix("s"),
            row.name,
            "yes" if row.claims_to_balance else "",
            f"{row.max_vio_before:.2f}",
            f"{row.max_vio_after:.2f} ± {row.max_vio_after_std:.2f}",
            f"{row.ratio:.2f}",
            f"{row.max_vio_in_eval:.2f}",
            f"{row.task_loss_relative:.2f} ± {row.task_loss_relative_std:.2f}",
        )
    return result


def _chosen(only: Sequence[str] | None, options: Sequence[str]) -> list[Strategy]:
    known = {strategy.name: strategy for strategy in strategies()}
    own = [name for name in only or () if ":" in name]
    if unknown := [name for name in only or () if name not in known and name not in own]:
        raise ConfigError(f"no strategy {unknown[0]!r}; known: {', '.join(known)}, or your own module:Class")
    if options and len(own) != 1:
        raise ConfigError(f"--set: is for one strategy of your own, and --only names {len(own)} of them")
    return [
        *(strategy for name, strategy in known.items() if not only or name in only),
        *(own_strategy(name, parse_sets(options)) for name in own),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print; 1 if a strategy that claims to balance did not halve MaxVio, or no balancing did."""
    parser = argparse.ArgumentParser(
        prog="python -m himoe.testing.behaviour", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=5, help="how often each is trained (default 5)")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (default 300)")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help='strategies to run, also your own "module:Class" (default all)'
    )
    parser.add_argument(
        "--set",
        action="append",
        metavar="KEY=VALUE",
        default=[],
        dest="options",
        help="option of your own strategy: a weight or rate for some hundred steps",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    given = parser.parse_args(arguments)
    try:
        chosen = _chosen(given.only, given.options)
    except ConfigError as error:
        parser.error(str(error))
    rows = compare(chosen, given.seeds, given.steps, lambda name: print(name, file=sys.stderr))
    if given.json:
        print(json.dumps({"seeds": given.seeds, "steps": given.steps, "rows": [asdict(row) for row in rows]}, indent=1))
    else:
        Console().print(table(rows))
    failed = [row.name for row in rows if row.claims_to_balance and row.ratio >= HALVED]
    failed += [row.name for row in rows if row.name == NOTHING.name and row.ratio < HALVED]
    if failed:
        print(f"not as claimed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
