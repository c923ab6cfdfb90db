"""The routing of a trained run, taken from its model and its text."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from himoe import run
from himoe.bench.layer import Settings, measure
from himoe.bench.real import real_routing
from himoe.config import load_config
from himoe.errors import ConfigError
from himoe.trained import load_run

SETS = ["train.threads=1", "train.steps=2", "train.warmup_steps=0", "data.held_out=0.1", "data.eval_tokens=200"]
QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A little text, and a cache of its own."""
    folder = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIMOE_CACHE", str(folder / "cache"))
        (folder / "text.txt").write_text("".join(f"{i} words, some others, {i * i}\n\n" for i in range(2000)))
        yield folder / "text.txt"


def train(text, out, *sets):
    run.train(load_config("lm_tiny", sets=[f"data.path={text}", *SETS, *sets]), out=out, console=QUIET)
    return out


def test_it_is_what_the_runs_router_chooses(text, tmp_path):
    out = train(text, tmp_path / "run")
    found = real_routing(out, QUIET, tokens=128)
    assert found.shape.record() == {"name": "run", "T": 128, "D": 32, "F": 32, "E": 8, "K": 4}
    ids, weights = found.choice.expert_ids, found.choice.weights
    assert ids.shape == (128, 4) and torch.allclose(weights.sum(-1), torch.ones(128), atol=1e-5)
    groups = ids // 2  # hi_moe takes one of the two experts of every group
    assert torch.equal(groups.sort(-1).values, torch.arange(4).expand(128, 4))
    model = load_run(out).model
    assert found.layer in model.moe_layer_indices()
    [row] = measure(found.shape, "fp32", {"real": found.choice}, Settings(["loop"], ["dense"], 0.0))
    loads = torch.bincount(ids.flatten(), minlength=8).double()
    assert row["routing"] == "real" and row["largest_load"] == pytest.approx((loads.max() / loads.mean()).item())
    assert row["failed"] == {}


def test_more_tokens_than_the_text_has_read_it_again(text, tmp_path):
    found = real_routing(train(text, tmp_path / "run"), QUIET, tokens=64 * 1000)
    assert found.shape.tokens == 64 * 1000 and replace(found.shape, tokens=1).dim == 32


def test_a_run_without_experts_is_refused(text, tmp_path):
    out = train(text, tmp_path / "dense", "moe.every=0")
    with pytest.raises(ConfigError, match="must have MoE layers"):
        real_routing(out, QUIET)
