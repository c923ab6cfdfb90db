"""What can only be known of an entry itself, such as its state: read off a small layer that is built with it."""

import inspect
import warnings
from dataclasses import dataclass, field
from typing import Any

from himoe.errors import HimoeError, HimoeWarning
from himoe.registry import TABLES, fact, load

# Sizes of the small layer, by which the letters of a shape are known again.
DIM = 10
SIZES = {"num_experts": 12, "num_groups": 3, "top_k": 3, "expert_dim": 14, "force": True}
LETTERS = {12: "E", 24: "2E", 10: "D", 14: "F", 28: "2F", 3: "G"}

BESIDE = {"selector": "top_k"}
"""What stands beside a part that is not made for anything else."""


@dataclass(frozen=True)
class Facts:
    """What an entry is once it is built.

    Attributes:
        state: what is saved with a model and moves without gradients, by name, with shape and dtype.
        parameters: what is learned, likewise.
        balances_load: whether it drives the experts towards equal load; None where that is not its business.
        causal: whether it leaves earlier tokens alone; None where it could not be built by itself.
        made_of: of a preset, the entries that it puts together, by table.
    """

    state: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    balances_load: bool | None = None
    causal: bool | None = None
    made_of: dict[str, list[str]] = field(default_factory=dict)


def beside(kind: str, name: str) -> dict[str, Any]:
    """Return the keys of `moe` that stand beside an entry in a layer: what it is made for, else a plain selector.

    >>> beside("scores", "softmax"), beside("balancers", "load"), beside("experts", "gelu")
    ({'selector': 'top_k'}, {'selector': 'top_k', 'gate': 'noisy'}, {})
    """
    made_for = {key: value for key, value in fact(kind, name, "goes_with", {}).items() if key != "balancer"}
    needed = kind in ("gates", "scores", "selectors") or (kind == "balancers" and made_for)
    return (BESIDE if needed and kind != "selectors" else {}) | made_for


def facts_of(kind: str, name: str) -> Facts:
    """Build a small layer with an entry and say what is seen of it; imports PyTorch."""
    from torch import nn

    from himoe.balance import Balancer

    layer = _layer_with(kind, name)
    thing = load(kind, name) if layer is None else _part(kind, layer)
    if layer is None and inspect.isclass(thing):
        return Facts()
    if not isinstance(thing, nn.Module):
        balances = bool(getattr(thing, "balances_load", False)) if kind == "selectors" else None
        return Facts(balances_load=balances, causal=getattr(thing, "causal", True))
    return Facts(
        state={name: _shape(value) for name, value in thing.named_buffers()},
        parameters={name: _shape(value) for name, value in thing.named_parameters()},
        balances_load=_balances(thing, Balancer) if kind in ("balancers", "presets") else None,
        causal=_causal(layer),
        made_of=_composition(thing) if kind == "presets" else {},
    )


def _layer_with(kind: str, name: str) -> Any:
    """Return a small MoE layer with the entry and what it is made for; None where that cannot be built."""
    from himoe.build import build_moe
    from himoe.config import load_config

    key = kind if kind in ("experts", "balancers") else kind.removesuffix("s")
    moe = SIZES | beside(kind, name) | {key: [{"name": name}] if kind == "balancers" else name}
    if kind == "balancers":
        moe = BESIDE | moe
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HimoeWarning)
        try:
            return build_moe(load_config("lm_tiny", overrides={"moe": moe}).moe, DIM)
        except HimoeError:
            return None


def _part(kind: str, layer: Any) -> Any:
    """Return that of a layer which comes from a table: a module, or a function without its options."""
    from himoe.functional.bound import unbound

    router = layer.router
    if kind == "balancers":
        return router.balancer.parts[0]
    parts = {"gates": router.gate, "selectors": router.selector, "scores": router.score, "experts": layer.experts}
    part = parts.get(kind, router)
    return unbound(part)


def _balances(thing: Any, kind: type) -> bool:
    from himoe.functional.bound import unbound

    parts = [part for part in thing.modules() if isinstance(part, kind)]
    parts += [unbound(thing.selector)] if hasattr(thing, "selector") else []
    return any(getattr(part, "balances_load", False) for part in parts)


def _causal(layer: Any) -> bool:
    from himoe.nn import non_causal_parts

    return not non_causal_parts(layer)


def _composition(router: Any) -> dict[str, list[str]]:
    """Return the names in their tables of what a preset puts together, or those of their classes."""
    from himoe.balance import Balancer, Chain

    balancers = [m for m in router.balancer.modules() if isinstance(m, Balancer) and not isinstance(m, Chain)]
    parts = {"gates": [router.gate], "scores": [router.score], "selectors": [router.selector], "balancers": balancers}
    return {table: [_name(table, part) for part in found] for table, found in parts.items()}


def _name(table: str, part: Any) -> str:
    from himoe.functional.bound import unbound

    thing = unbound(part)
    made_by = thing if inspect.isfunction(thing) else type(thing)
    own = f"{made_by.__module__}:{made_by.__name__}"
    return next((name for name in TABLES[table] if load(table, name) is made_by), own)


def _shape(value: Any) -> str:
    """Return a shape in the project's letters and the dtype, as in `(E, D) float32`."""
    sizes = ", ".join(LETTERS.get(size, str(size)) for size in value.shape)
    return f"({sizes}{',' * (value.ndim == 1)}) {str(value.dtype).removeprefix('torch.')}"
