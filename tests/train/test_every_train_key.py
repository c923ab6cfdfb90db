"""Every key of `[train]`, set away from its default and its recipe, reaches the place where it acts."""

import inspect
import io

import pytest
import torch
from rich.console import Console

from himoe import run, trained
from himoe.config import load_config

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
    "grad_clip": 0.7,
    "precision": "bf16",
    "log_every": 4,
    "eval_every": 3,
    "checkpoint_every": 2,
    "keep_checkpoints": 3,
    "threads": 3,
}
PLACES = {
    "TrainingOrder": {"seq_len"},
    "build_optimizer": {"learning_rate", "weight_decay", "betas"},
    "learning_rate_schedule": {"steps", "warmup_steps", "decay_fraction"},
    "Trainer": {"batch_size", "accumulate", "grad_clip", "precision"},
    "fit": {"steps", "log_every", "eval_every", "checkpoint_every"},
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

    for name in PLACES:
        spy(run, name)
    spy(run, "save")
    spy(trained, "evaluate_domains")
    monkeypatch.setattr(torch, "set_num_threads", lambda number: found.update(threads=number))
    monkeypatch.setenv("HIMOE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "notes.txt"
    path.write_text("\n".join(f"{i} roses are red, violets are blue" for i in range(200)))
    sets = [f"train.{key}={list(value) if isinstance(value, tuple) else value}" for key, value in KEYS.items()]
    config = load_config("lm_tiny", sets=[f"data.path={path}", "data.held_out=0.2", f"seed={SEED}", *sets])
    assert config.train.model_dump() == KEYS
    run.train(config, out=tmp_path / "run", console=Console(file=io.StringIO()))
    return found


def test_every_key_reaches_its_place(given):
    usual = load_config("lm_tiny").train.model_dump()
    assert not [key for key, value in KEYS.items() if value == usual[key]]
    for place, keys in PLACES.items():
        assert {key: given[place][key] for key in keys} == {key: KEYS[key] for key in keys}, place
    schedule = given["learning_rate_schedule"]
    assert (schedule["name"], schedule["peak"], schedule["min_ratio"]) == ("wsd", 2e-3, 0.25)
    assert given["TrainingOrder"]["seed"] == SEED
    assert given["save"]["keep"] == KEYS["keep_checkpoints"]
    assert given["threads"] == KEYS["threads"]
    how = given["evaluate_domains"]["how"]
    assert (how["seq_len"], how["batch_size"], how["precision"]) == (16, 2, "bf16")
