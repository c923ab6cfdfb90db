"""Every entry of every table, and every order of capacity, in a small language model; and one training step of it.

The lists below come from the tables, and the models from the entries' own cards, so that a new entry is in every test
that goes over them. Layer 0 has no experts, layers 1 and 2 have; weights and rates are so large that routing is uneven
and balancing shows.
"""

import tomllib
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import himoe
from himoe import DecoderLM, Router
from himoe.balance import Balancer
from himoe.build import build_model
from himoe.cli.cards import card
from himoe.config import load_config
from himoe.functional.dispatch import ORDERS
from himoe.functional.selection import replay
from himoe.functional.stats import selected_load
from himoe.nn import non_causal_parts
from himoe.registry import TABLES, load

V, E, K, G, D, HIDDEN = 31, 8, 4, 4, 8, 6
Entry = tuple[str, str]

EVERY: list[Entry] = [(table, name) for table in sorted(TABLES) for name in sorted(TABLES[table])]
CAPACITIES: list[Entry] = [("capacity", order) for order in sorted(ORDERS)]
PRESETS = sorted(TABLES["presets"])
PRESETS_WITH_CAPACITY = [(preset, order) for preset in PRESETS for order in sorted(ORDERS)]

STRONGER = {"weight": 0.3, "lambda_intra": 0.2, "lambda_inter": 0.3, "rate": 0.05, "tau": 0.5, "start": 0.05}
"""What replaces the attributes of balancers, which are made for thousands of steps."""

GIVEN = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(word))[:K] for word in range(V)])


def id_of(entry: Entry) -> str:
    """The name of a test's case."""
    return f"{entry[0].removesuffix('s')} {entry[1]}"


def replayed(scores: Tensor, context: himoe.RouterContext) -> tuple[Tensor, Tensor]:
    """`replay`, whose options no configuration can hold: experts by word, the last of even words left out."""
    ids = context.token_ids
    selected = (torch.arange(K) < K - 1) | (ids % 2 == 1)[:, None]
    return replay(scores, context, expert_ids=GIVEN[ids], selected=selected)


@cache
def _configuration(table: str, name: str) -> str:
    if table == "capacity":
        return f'[moe]\nselector = "top_k"\ncapacity_order = "{name}"\ncapacity_factor = 0.75'
    return card(table, name).configuration


def _options(table: str, name: str) -> dict[str, Any]:
    """What a selector asks for in a toy."""
    options = getattr(load(table, name), "toy_options", None) if table == "selectors" else None
    return {} if options is None else {"selector_options": options}


def _config(table: str, name: str, **moe: Any) -> Any:
    tree = tomllib.loads(_configuration(table, name)).get("moe", {})
    sizes = {"layers": [1, 2], "num_experts": E, "num_groups": G, "top_k": K, "expert_dim": HIDDEN, "force": True}
    if table == "balancers" or (table, name) == ("selectors", "replay"):
        tree = {"selector": "top_k"} | tree
    model = {"num_layers": 3, "dim": D, "ffn_dim": 12}
    changes = {"allow_non_causal": True, **tree, **_options(table, name), **sizes, **moe}
    if pools := changes.get("pools"):  # a card's, for as many experts as there are
        changes["pools"] = [pool | {"num_experts": changes["num_experts"] // len(pools)} for pool in pools]
    return load_config("lm_tiny", overrides={"model": model, "moe": changes})


def make(entry: Entry, *, dtype: torch.dtype = torch.float64, scale: float = 8.0, **moe: Any) -> DecoderLM:
    """Build the model of an entry; further keys are those of the section `moe`."""
    model = build_model(_config(*entry, **moe), V)
    for layer in himoe.moe_layers(model):
        if entry == ("selectors", "replay"):
            layer.router.selector = replayed
        strengthen(layer.router.balancer)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
        for layer in himoe.moe_layers(model):
            layer.router.gate.weight.mul_(scale)
    return model.to(dtype)


def strengthen(balancer: Balancer) -> None:
    """Raise weights and rates, and start anew from them."""
    for part in balancer.modules():
        for name, value in STRONGER.items():
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, value)
        if isinstance(part, Balancer):
            part.reset_parameters()


def steady_noise(self: Router, like: Tensor, mask: Tensor | None = None) -> Tensor:
    """In place of `Router.standard_noise`: a function of the token, so that a batch may be padded or cut."""
    return 1.4 * torch.sin(300 * like.detach() + torch.arange(like.shape[-1]))


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Ids (rows, length) at random."""
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model: DecoderLM, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor], list]:
    """Cross-entropy of the real tokens themselves, each auxiliary term, and the routings."""
    logits, routings = model(ids, mask)
    targets = ids if mask is None else ids.masked_fill(~mask, -100)
    task = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    return task, himoe.aux_losses(model, routings), routings


def gradients(model: DecoderLM, value: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter, 0 where it has none."""
    if not value.requires_grad:
        return {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    found = torch.autograd.grad(
        value, list(model.parameters()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(dict(model.named_parameters()), found, strict=True))


def state_of(model: DecoderLM) -> dict[str, Tensor]:
    """A copy of the state of all balancers."""
    return {name: value.clone() for name, value in model.named_buffers()}


def parts_of(model: DecoderLM) -> list[Balancer]:
    """All balancers, also those inside of others."""
    return [module for module in model.modules() if isinstance(module, Balancer)]


def sums_of(model: DecoderLM) -> dict[str, Tensor]:
    """A copy of what all balancers have collected since the last step."""
    return {f"{i} {key}": value.clone() for i, part in enumerate(parts_of(model)) for key, value in part.sums.items()}


def train(model: DecoderLM, batches: Iterable[Tensor]) -> DecoderLM:
    """Let the balancers see one batch in each optimizer step; the parameters stay."""
    for ids in batches:
        himoe.observe(model, model(ids)[1])
        himoe.step(model)
    return model


def moved(entry: Entry, **options: Any) -> DecoderLM:
    """A model whose balancers have state by now."""
    return train(make(entry, **options), (tokens(4, 9, seed=70 + step) for step in range(3)))


def training_step(model: DecoderLM, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """All that an optimizer step comes to, by name."""
    task, terms, routings = loss_of(model, ids, mask)
    found = {"task": task.detach()} | {f"term {name}": value.detach() for name, value in terms.items()}
    found |= {f"gradient {name}": value for name, value in gradients(model, task).items()}
    found |= {f"auxiliary gradient {n}": v for n, v in gradients(model, sum(terms.values(), task * 0)).items()}
    for layer, routing in enumerate(routings):
        real = slice(None) if mask is None else mask.flatten()
        found |= {f"selected {layer}": selected_load(routing), f"kept {layer}": routing.kept[real]}
        found[f"choice {layer}"] = routing.expert_ids.where(routing.selected, -1)[real]
    himoe.observe(model, routings)
    found |= {f"sum {name}": value for name, value in sums_of(model).items()}
    himoe.step(model)
    return found | {f"state {name}": value for name, value in state_of(model).items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    """Everything the same; what balancers keep in fp32 to its last digits."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if not value.is_floating_point():
            assert torch.equal(value, other[name]), f"{name} differs"
            continue
        near = max(tolerance, 1e-6) if value.dtype == torch.float32 else tolerance
        torch.testing.assert_close(other[name], value, rtol=near, atol=near, msg=f"{name} differs")


def claims_causal(model: DecoderLM) -> bool:
    """Whether every part says that later tokens leave earlier ones alone."""
    return not non_causal_parts(model)


def measure_largest(call: Callable[[], Any]) -> int:
    """Return the number of elements of the largest tensor that any operation makes."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self.elements = max([self.elements, *sizes])
            return result

    with Largest() as watch:
        call()
    return watch.elements
