"""A reader's own router parts, balancers, experts and presets, named in a configuration as `"module:name"`."""

import sys

import pytest
import torch
from tiny_recipe import DIM, config, parts, router

from himoe import moe_layers
from himoe.balance import Switch, ZLoss
from himoe.build import build_model
from himoe.errors import ConfigError
from himoe.functional import scores


def test_a_readers_own_class_and_function():
    built = router(preset="himoe.presets:moge", options={"alpha": 0.5}, balancers=[{"name": "himoe.balance:ZLoss"}])
    assert parts(built, Switch)[0].weight == 0.5 and parts(built, ZLoss)
    own = {"selector": "himoe.functional.selection:top_k", "score": "himoe.functional.scores:sigmoid"}
    spelled = router(**own, balancers=[{"name": "loss_free"}])
    assert spelled.score is scores.sigmoid and spelled(torch.randn(2, DIM)).expert_ids.shape == (2, 4)


@pytest.mark.parametrize(
    ("moe", "text"),
    [
        ({"experts": "math:pi"}, "^moe.experts 'math:pi': must be a function or class whose parameters have names$"),
        ({"experts": "json:dumps"}, "^moe.experts 'json:dumps': .*positional argument"),
        ({"experts": "torch.nn:Identity"}, "^moe.experts 'torch.nn:Identity': fails on one token: "),
        ({"experts": "builtins:complex"}, "^moe.experts 'builtins:complex': "),
        (
            {"experts": "unittest.mock:Mock"},
            "^moe.experts .*: gives a Mock, must give a torch.nn.modules.module.Module$",
        ),
        ({"selector": "math:pi"}, "^moe.selector 'math:pi': must be a function or class whose parameters have names$"),
        ({"selector": "torch:topk"}, "^moe.selector 'torch:topk': must be a function or class"),
        ({"selector": "json:dumps"}, "^moe.selector 'json:dumps': fails on one token: "),
        ({"selector": "top_k", "score": "math:pi"}, "^moe.score 'math:pi': fails on one token: 'float' object is not"),
        ({"selector": "top_k", "score": "math:sin"}, "^moe.score 'math:sin': fails on one token: "),
        ({"preset": "math:pi"}, "^moe.preset 'math:pi': must be a function or class"),
        ({"balancers": [{"name": "math:pi"}]}, r"^moe.balancers\[0\] 'math:pi': must be a function or class"),
        (
            {"balancers": [{"name": "torch.nn:Identity"}]},
            r"^moe.balancers\[0\] .*: gives a Identity, must give a himoe.",
        ),
    ],
)
def test_a_readers_own_part_that_does_not_fit_is_one_line(moe, text):
    extra = {} if "balancers" in moe else {"balancers": [{"name": "switch"}]}
    with pytest.raises(ConfigError, match=text) as caught:
        build_model(config(**moe, **extra), 300)
    assert "\n" not in str(caught.value)


def noisy(logits):
    return (logits + torch.rand_like(logits)).softmax(-1)


def test_a_readers_own_part_is_tried_out_without_a_trace(monkeypatch):
    monkeypatch.setitem(sys.modules, "reader", sys.modules[__name__])
    table = {"experts": "swiglu", "selector": "top_k", "score": "softmax", "balancers": [{"name": "loss_free"}]}
    own = table | {
        "experts": "himoe.nn.experts:SwiGLUExperts",
        "selector": "himoe.functional.selection:top_k",
        "score": "reader:noisy",
    }
    one, other = build_model(config(**table), 300), build_model(config(**own), 300)
    assert all(module.training for module in other.modules())
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert moe_layers(other)[0].router.score is noisy
