"""A language model that is not causal is refused with the reason, unless that is allowed: then one warning tells it."""

import sys
import warnings

import pytest
import torch
from tiny_recipe import config

from himoe import moe_layers, non_causal_parts
from himoe.balance import Balancer
from himoe.build import build_model, build_moe
from himoe.cli import main
from himoe.config import load_config
from himoe.errors import ConfigError, HimoeWarning
from himoe.functional.selection import top_k
from himoe.nn import SwiGLUExperts


def best_tokens(scores, context, *, k):
    """A reader's own selector, which looks at all tokens of a batch."""
    return top_k(scores - scores.mean(0), context, k=k)


best_tokens.causal = False
best_tokens.causal_reason = "compares tokens"
best_tokens.balances_load = True


def ranks(logits):
    """A reader's own score, of a token among others."""
    return (logits - logits.mean(0)).softmax(-1)


ranks.causal = False


class Peeking(Balancer):
    """A reader's own balancer."""

    balances_load, causal = True, False


class Mixing(SwiGLUExperts):
    """A reader's own experts."""

    causal = False


SWITCH = [{"name": "switch"}]
NOT_CAUSAL = {
    "the mean of the same batch": (
        {"options": {"correction": "same_batch"}},
        r"^LogitCorrection \(the mean of the same batch holds later tokens; mean_from = previous is causal\): not c",
    ),
    "the paper's preset": ({"preset": "hi_moe_paper"}, r"^LogitCorrection \("),
    "the authors' preset": ({"preset": "hi_moe_official"}, r"^LogitCorrection \("),
    "a balancer beside a preset": (
        {"preset": "moge", "balancers": [{"name": "logit_correction", "mean_from": "same_batch"}]},
        r"^LogitCorrection \(",
    ),
    "a balancer for every group": (
        {"preset": "moge", "balancers": [{"name": "logit_correction", "mean_from": "same_batch", "per_group": True}]},
        r"^LogitCorrection \(",
    ),
    "an order of places": (
        {"capacity_factor": 1.0, "capacity_order": "score"},
        r"^Capacity \(later tokens can take the places of earlier ones; order = token_major is causal\): not causal",
    ),
    "a selector": ({"selector": "reader:best_tokens"}, r"^best_tokens \(compares tokens\): not causal"),
    "a score": ({"selector": "top_k", "score": "reader:ranks", "balancers": SWITCH}, "^ranks: not causal"),
    "a balancer": ({"selector": "top_k", "balancers": [{"name": "reader:Peeking"}]}, "^Peeking: not causal"),
    "experts": ({"experts": "reader:Mixing"}, "^Mixing: not causal"),
    "two parts": (
        {"experts": "reader:Mixing", "selector": "reader:best_tokens"},
        r"^Mixing, best_tokens \(compares to",
    ),
}


@pytest.fixture(autouse=True)
def reader(monkeypatch):
    """Make this file importable as somebody's module."""
    monkeypatch.setitem(sys.modules, "reader", sys.modules[__name__])


def warned(**moe):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = build_model(config(**moe), 300)
    return model, [str(warning.message) for warning in caught if issubclass(warning.category, HimoeWarning)]


@pytest.mark.parametrize("name", NOT_CAUSAL)
@pytest.mark.filterwarnings("ignore:global intra:himoe.errors.HimoeWarning")
def test_it_is_refused_in_one_line_with_the_reason_and_the_way_out(name):
    moe, text = NOT_CAUSAL[name]
    with pytest.raises(ConfigError, match=text) as caught:
        build_model(config(**moe), 300)
    assert "\n" not in str(caught.value)
    assert "sees its future in training; choose another, or train it all the same with --allow-non-c" in str(
        caught.value
    )


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_it_is_built_with_one_warning_where_it_is_allowed(name):
    moe, text = NOT_CAUSAL[name]
    for _ in range(2):  # a second model warns again; the layers of one do not
        model, texts = warned(**moe, allow_non_causal=True)
        (told,) = [one for one in texts if "not causal" in one]
        assert told.endswith("sees its future in training and its loss is too good")
        with pytest.raises(AssertionError, match=text):
            raise AssertionError(told)
        assert len(moe_layers(model)) == 2


@pytest.mark.parametrize(
    "moe",
    [
        {},
        {"capacity_factor": 1.0},
        {"preset": "moge"},
        {"preset": "switch"},
        {"preset": "loss_free"},
        {"preset": "deepseek_v3"},
        {"preset": "hi_moe_paper", "options": {"correction": "previous", "lambda_inter": 0.3}},
        {"every": 0, "preset": "hi_moe_paper"},
    ],
)
@pytest.mark.parametrize("allowed", [True, False])
def test_what_is_causal_passes_in_silence(moe, allowed):
    model, texts = warned(**moe, allow_non_causal=allowed)
    assert texts == []
    assert torch.isfinite(model(torch.zeros(1, 2, dtype=torch.int64))[0]).all()


def test_the_command_line_refuses_it_with_status_2_before_anything_is_written(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HIMOE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("some words, some others, and the rest of them\n\n" * 400)
    arguments = ["train", "lm_tiny", "--data", "text.txt", "--set", "moe.options={correction='same_batch'}"]
    assert main([*arguments, "--out", "run"]) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and last.startswith("himoe: LogitCorrection (") and "--allow-non-causal" in last
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("moe", "causal"),
    [
        ({"preset": "switch", "top_k": 1}, True),
        ({"preset": "switch", "top_k": 2}, False),
        ({"preset": "moge", "num_groups": 4, "top_k": 4}, True),
        ({"preset": "moge", "num_groups": 2, "top_k": 4}, False),
    ],
)
def test_column_by_column_is_causal_where_an_expert_stands_in_one_column(moe, causal):
    moe = moe | {"capacity_factor": 0.6, "capacity_order": "column_major"}
    layer = build_moe(load_config("lm_tiny", overrides={"moe": moe}).moe, 16)
    assert (not non_causal_parts(layer)) == causal
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    kept = layer(x)[1].kept
    layer.dispatcher.order = "token_major"
    assert torch.equal(kept, layer(x)[1].kept) == causal and not kept.all()
