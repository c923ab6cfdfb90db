"""Every key of `[train]`, set away from its default and its recipe, reaches the place where it acts."""

import inspect
import io
import json

import pytest
import torch
from rich.console import Console

from himoe import run, trained
from himoe.config import load_config
from himoe.models import DecoderLM
from himoe.train import start
from himoe.train.schedule import learning_rate_schedule

SEED = 11
KEYS = {
    "steps": 7,
    "batch_size": 6,
    "accumulate": 3,
    "seq_len": 16,
    "learning_rate": 2e-3,
    "min_learning_rate_ratio": 0.25,
    "warmup_steps": 3,
    "schedule": "wsd",
    "decay_fraction": 0.4,
    "weight_decay": 0.03,
    "betas": (0.8, 0.9),
    "optimizer": "muon",
    "muon_momentum": 0.85,
    "grad_clip": 0.7,
    "precision": "bf16",
    "ema_decay": 0.75,
    "recompute": "full",
    "compile": True,
    "log_every": 4,
    "eval_every": 2,
    "checkpoint_every": 2,
    "keep_checkpoints": 3,
    "keep_every": 4,
    "keep_best": False,
    "early_stop": 1,
    "stop_on_alarm": True,
    "log_to": ["tensorboard"],
    "threads": 3,
}
ELSEWHERE = {"init_from"}
"""Keys with a test file of their own."""
PLACES = {
    "TrainingOrder": {"seq_len"},
    "Batches": {"batch_size", "accumulate"},
    "build_optimizer": {"learning_rate", "weight_decay", "betas", "optimizer", "muon_momentum"},
    "Trainer": {"grad_clip", "precision", "ema_decay"},
    "fit": {
        "steps",
        "log_every",
        "eval_every",
        "checkpoint_every",
        "keep_best",
        "early_stop",
        "stop_on_alarm",
    },
}
"""Where a key is an argument of its own name; the others are asked for one by one."""


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Return what each place was called with, by argument, in a run with all keys set."""
    found = {}

    def spy(module, name):
        original = getattr(module, name)

        def called(*args, **kwargs):
            found[name] = inspect.signature(original).bind(*args, **kwargs).arguments
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, called)

    for name in ("TrainingOrder", "Batches", "build_optimizer", "Trainer"):
        spy(start, name)
    for name in ("fit", "save"):
        spy(run, name)
    monkeypatch.setattr(run, "open_writers", lambda names, identity, warn: found.update(writers=names))
    spy(trained, "evaluate_domains")
    monkeypatch.setattr(DecoderLM, "compile_blocks", lambda self: found.update(compiled=self))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: found.update(threads=number))
    monkeypatch.setenv("HIMOE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "notes.txt"
    path.write_text("\n".join(f"{i} roses are red, violets are blue" for i in range(200)))
    sets = [f"train.{key}={json.dumps(value)}" for key, value in KEYS.items()]
    config = load_config(
        "lm_tiny", sets=[f"data.path={path}", "data.held_out=0.2", "data.eval_tokens=64", f"seed={SEED}", *sets]
    )
    assert {key: value for key, value in config.train.model_dump().items() if key not in ELSEWHERE} == KEYS
    run.train(config, out=tmp_path / "run", console=Console(file=io.StringIO()))
    return found


def test_every_key_reaches_its_place(given):
    usual = load_config("lm_tiny").train.model_dump()
    assert not [key for key, value in KEYS.items() if value == usual[key]]
    for place, keys in PLACES.items():
        assert {key: given[place][key] for key in keys} == {key: KEYS[key] for key in keys}, place
    expected = learning_rate_schedule("wsd", 2e-3, steps=7, warmup_steps=3, min_ratio=0.25, decay_fraction=0.4)
    rate = given["Trainer"]["learning_rate"]
    assert [rate(step) for step in range(1, 9)] == [expected(step) for step in range(1, 9)]
    assert given["TrainingOrder"]["seed"] == SEED
    assert {key: given["save"][key] for key in ("keep", "keep_every", "keep_best")} == {
        "keep": 3,
        "keep_every": 4,
        "keep_best": False,
    }
    assert given["Trainer"]["model"] is given["compiled"] and given["compiled"].recompute == "full"
    assert given["writers"] == ["tensorboard"]
    assert given["threads"] == KEYS["threads"]
    reading = given["evaluate_domains"]["reading"]
    assert (reading.seq_len, reading.batch_size, reading.precision) == (16, 2, "bf16")
