"""The layer is one graph with every selector of a language model: fp32 and bf16, with and without capacity."""

import inspect
from functools import partial

import pytest
import torch
from small_layers import D, E, tokens

from himoe import Capacity, Dropless, Gate, Groups, LossFree, MoE, Router, SwiGLUExperts, registry
from himoe.functional import scores

ALLOWED = [name for name in registry.SELECTORS if getattr(registry.load("selectors", name), "causal", True)]
GIVEN = {"expert_ids": torch.arange(24).view(12, 2) % E}  # what `replay` needs


def make_layer(name: str, dtype: torch.dtype, dispatcher) -> MoE:
    selector = registry.load("selectors", name)
    given = {"groups": Groups.equal(E, 2), "k": 1 if name in registry.GROUPED_SELECTORS else 2, "max_k": 3, **GIVEN}
    given = {key: value for key, value in given.items() if key in inspect.signature(selector).parameters}
    selector = partial(selector, **(getattr(selector, "toy_options", {}) | given))
    torch.manual_seed(0)
    router = Router(Gate(D, E), selector, num_experts=E, score=scores.softmax, balancer=LossFree(E))
    return MoE(router, SwiGLUExperts(E, D, 16), dispatcher=dispatcher).to(dtype)


@pytest.mark.parametrize("capacity", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALLOWED)
def test_the_layer_is_one_graph(name, dtype, capacity):
    layer = make_layer(name, dtype, Capacity(0.7) if capacity else Dropless())
    x, token_ids = tokens(3, 4, dtype=dtype).requires_grad_(), torch.arange(12).view(3, 4)
    trained = [x, *layer.parameters()]

    def with_gradients(function):
        y, routing = function(x, token_ids=token_ids)
        return y, routing.kept, torch.autograd.grad(y.float().square().sum(), trained)

    torch.compiler.reset()
    expected = with_gradients(layer)
    found = with_gradients(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(found, expected)
    assert bool(expected[1].all()) != capacity or name not in ("top_k", "hash")  # something was dropped
