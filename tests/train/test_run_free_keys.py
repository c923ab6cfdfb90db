"""Every key that resume calls free: a run goes on with another value of it, and comes to the same weights."""

import shutil

import pytest
import safetensors.torch
from run_case import SETS, read, state, weights

from himoe.cli import main
from himoe.data import ByteTokenizer
from himoe.models import DecoderLM
from himoe.train.snapshot import FREE_KEYS

BASE = ["train.steps=4", "train.checkpoint_every=2", "train.eval_every=2", "model.num_layers=1", "moe.preset=loss_free"]
VALUES = {
    "name": "another",
    "data.workers": 1,
    "data.eval_tokens": 64,
    "moe.backend": "loop",
    "moe.force": "true",
    "moe.allow_non_causal": "true",
    "train.accumulate": 2,
    "train.recompute": "full",
    "train.compile": "true",
    "train.threads": 2,
    "train.log_every": 1,
    "train.eval_every": 1,
    "train.checkpoint_every": 1,
    "train.keep_checkpoints": 1,
    "train.keep_every": 2,
    "train.keep_best": "false",
    "train.early_stop": 1,
    "train.stop_on_alarm": "true",
    "train.log_to": '["tensorboard"]',
}
ROUNDED = {"moe.backend", "train.accumulate", "train.recompute", "train.compile", "train.threads"}
"""Their sums may be in another order."""
MOVED = ("data.path", "data.sources", "data.tokenizer")


def run(*arguments):
    assert main(["train", "--json", *arguments]) == 0


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A run over a mixture of two sources."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    tokenizer = tmp_path_factory.mktemp("tokenizers") / "tokenizer.json"
    tokenizer.write_text(ByteTokenizer().to_json())
    sources = f"data.sources={{prose = '{text / 'prose'}', verse = '{text / 'verse'}'}}"
    sets = [*SETS, *BASE, sources, "data.weights={verse = 0.75, prose = 0.25}", f"data.tokenizer={tokenizer}"]
    run("lm_tiny", "--out", str(out), *(word for value in sets for word in ("--set", value)))
    return out


@pytest.fixture
def stopped(finished, tmp_path):
    """The same run, stopped at step 2 of 4."""
    out = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(out / "checkpoints/step-00000004")
    return out


def resume(out, *sets):
    run("--resume", "--out", str(out), *(word for value in sets for word in ("--set", value)))


def test_the_tests_below_are_of_all_free_keys():
    assert {*VALUES, *MOVED} == FREE_KEYS


@pytest.mark.parametrize("key", VALUES)
def test_another_value_leaves_the_results_alone(finished, stopped, key, monkeypatch):
    monkeypatch.setattr(DecoderLM, "compile_blocks", lambda self: [b.compile(backend="eager") for b in self.blocks])
    before = read(stopped / "config.json")
    resume(stopped, f"{key}={VALUES[key]}")
    assert read(stopped / "config.json") != before
    found, expected = (safetensors.torch.load(weights(out, 4)) for out in (stopped, finished))
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= (1e-5 if key in ROUNDED else 0), name


def moved(text, folder):
    """Return what says that the text, and the tokenizer, lie elsewhere now."""
    shutil.copytree(text, folder / "moved")
    sources = f"data.sources={{prose = '{folder / 'moved/prose'}', verse = '{folder / 'moved/verse'}'}}"
    tokenizer = f"data.tokenizer={folder / 'run/tokenizer.json'}"
    return {"data.path": f"data.path={folder / 'moved'}", "data.sources": sources, "data.tokenizer": tokenizer}


@pytest.mark.parametrize("key", MOVED)
def test_data_may_lie_elsewhere_and_is_mixed_as_before(finished, stopped, text, tmp_path, key):
    resume(stopped, moved(text, tmp_path)[key])
    assert read(stopped / "config.json")["data"] != read(finished / "config.json")["data"]
    one, other = state(stopped, 4), state(finished, 4)
    assert {**one, "config": None} == {**other, "config": None}


def test_other_weights_are_refused_though_the_text_has_moved(stopped, text, tmp_path, capsys):
    change = moved(text, tmp_path)["data.sources"]
    arguments = ["--set", change, "--set", "data.weights={verse = 0.5, prose = 0.5}"]
    assert main(["train", "--resume", "--out", str(stopped), *arguments]) == 2
    assert "data.weights.prose was 0.25, now 0.5" in capsys.readouterr().err
