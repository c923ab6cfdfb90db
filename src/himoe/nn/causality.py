"""Which parts of a model say of themselves that a later token can change an earlier one's routing.

A part says so with `causal = False`: any module (a balancer, a dispatcher, a gate, experts), or the function that is a
selector or a score, through `functools.partial` too. A `causal_reason` beside it says why, in a few words. That a part
says nothing proves nothing: `himoe.testing.check_causality` measures it.
"""

from typing import Any

from torch import nn

from himoe.functional.bound import bound_options, name_of, unbound
from himoe.nn.dispatch import Capacity
from himoe.nn.moe import moe_layers
from himoe.nn.router import Router
from himoe.registry import GROUPED_SELECTORS


def _stands_in_one_column(router: Router) -> bool:
    """Return whether an expert is always the same choice of those of a token, as with one choice in every group."""
    k = bound_options(router.selector).get("k")
    one_each = k == 1 or (isinstance(k, tuple) and set(k) == {1})
    return router.top_k == 1 or (router.selector_name in GROUPED_SELECTORS and one_each)


def non_causal_parts(model: nn.Module) -> dict[str, str]:
    """Return the names of the parts that say they are not causal, each with its reason, empty where it gives none."""
    parts: list[Any] = [module for module in model.modules() if not isinstance(module, Router)]
    for layer in moe_layers(model):
        parts += [unbound(f) for f in (layer.router.selector, layer.router.score)]
        by_column = isinstance(layer.dispatcher, Capacity) and layer.dispatcher.order == "column_major"
        if by_column and _stands_in_one_column(layer.router):
            parts.remove(layer.dispatcher)  # each expert's places go token by token then
    return {
        name_of(part): getattr(part, "causal_reason", "") for part in parts if getattr(part, "causal", True) is False
    }
