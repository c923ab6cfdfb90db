"""A run that is stopped, by a kill, a signal or a full disk, and goes on later."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from run_case import SETS, config, lines, read, state, timeless, train, weights

from himoe import run
from himoe.errors import RunFolderError
from himoe.models import DecoderLM
from himoe.run_folder import read_log
from himoe.train import fit

EVERYTHING = ["train.accumulate=2", "train.recompute=selective", "train.ema_decay=0.9", "train.optimizer=muon"]
EVERYTHING += [
    "data.weights={verse=0.75, prose=0.25}",
    "train.schedule=wsd",
    "train.early_stop=1",
    "moe.preset=loss_free",
]


def test_kill_9_and_resume_equal_the_uninterrupted_run(text, tmp_path):
    out, whole = tmp_path / "killed", tmp_path / "whole"
    summary, _ = train(config(text, *EVERYTHING), whole)
    code = f"""
import time
from pathlib import Path
from himoe import run
from himoe.config import load_config
step = run.Trainer.step
run.Trainer.step = lambda self, **how: time.sleep(60) if self.steps_done == 6 else step(self, **how)
run.train(load_config("lm_tiny", sets={[f"data.path={text}", *SETS, *EVERYTHING]!r}), out=Path({str(out)!r}))
"""
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(read_log(out / "load.jsonl")) < 2 and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.01)  # until step 6 is logged, two steps past the checkpoint: those lines must be cut off again
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert not (out / "summary.json").exists()
    resumed, printed = train(config(text, *EVERYTHING), out, resume=True)
    assert "at step 4" in printed
    assert state(out) == state(whole)
    for name in ("metrics.jsonl", "load.jsonl"):
        assert timeless(lines(out / name)) == timeless(lines(whole / name))
    assert resumed["best"] == summary["best"]
    assert read(out / "env.json")["resumed"][0]["step"] == 4


def test_resume_with_compiled_layers_equals_the_uninterrupted_run(text, tmp_path, monkeypatch):
    """Traced to graphs, but without the step from these to machine code, which takes most of a minute."""
    monkeypatch.setattr(DecoderLM, "compile_blocks", lambda self: [b.compile(backend="eager") for b in self.blocks])
    sets = ["train.compile=true", "model.num_layers=1", "train.steps=4", "train.checkpoint_every=2"]
    train(config(text, *sets), tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, signal.SIGINT, 2)
        train(config(text, *sets), tmp_path / "stopped")
    torch.compiler.reset()  # as in another process
    train(config(text, *sets), tmp_path / "stopped", resume=True)
    assert weights(tmp_path / "stopped", 4) == weights(tmp_path / "whole", 4)


def interrupt_after(monkeypatch, number, step):
    """Send this process a signal in the middle of a step."""
    original = run.Trainer.step

    def interrupted(self, **how):
        if self.steps_done == step - 1:
            signal.raise_signal(number)
        original(self, **how)

    monkeypatch.setattr(run.Trainer, "step", interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_and_saves_it_and_the_run_goes_on_later(finished, text, tmp_path, monkeypatch, number):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, number, 2)
        summary, printed = train(config(text), out)
    assert (summary["status"], summary["step"]) == ("interrupted", 2)
    assert "--resume" in printed and (out / "checkpoints/step-00000002").is_dir()
    assert summary["domains"] == {} and summary["bits_per_byte"] is None
    summary, _ = train(config(text), out, resume=True)
    assert summary["status"] == "finished" and weights(out) == weights(finished[0])
    assert timeless(lines(out / "metrics.jsonl")) == timeless(lines(finished[0] / "metrics.jsonl"))


def test_a_part_of_the_text_is_not_compared_with_the_whole(text, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, signal.SIGINT, 5)
    summary, _ = train(config(text), tmp_path / "run")  # evaluated on the first 500 tokens at step 4
    assert {record["tokens"] for record in summary["domains"].values()} == {500}
    assert not any({"unigram", "bigram"} & record.keys() for record in summary["domains"].values())


def interrupt_at_once(monkeypatch):
    """Send this process a signal before the first step."""
    enter = fit.StopRequest.__enter__

    def interrupted(self):
        entered = enter(self)
        signal.raise_signal(signal.SIGINT)
        return entered

    monkeypatch.setattr(fit.StopRequest, "__enter__", interrupted)


def test_ctrl_c_before_the_first_step_saves_the_start(finished, text, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at_once(patch)
        summary, printed = train(config(text), out)
    assert (summary["status"], summary["step"]) == ("interrupted", 0)
    assert "interrupted and saved at step 0" in printed and (out / "checkpoints/step-00000000").is_dir()
    train(config(text), out, resume=True)
    assert weights(out) == weights(finished[0])


def test_ctrl_c_before_the_first_step_of_a_resumed_run_leaves_its_checkpoint_alone(text, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, signal.SIGINT, 2)
        train(config(text), tmp_path)
    checkpoint = tmp_path / "checkpoints/step-00000002"
    before = checkpoint.stat().st_ino
    interrupt_at_once(monkeypatch)
    summary, printed = train(config(text), tmp_path, resume=True)
    assert (summary["status"], summary["step"]) == ("interrupted", 2) and "saved at step 2" in printed
    assert checkpoint.stat().st_ino == before  # replacing the only one takes two renames: a kill between them loses it


def test_ctrl_c_between_two_steps_saves_the_one_before(text, tmp_path, monkeypatch):
    class Late(fit.StopRequest):
        """The signal comes after step 3 was found not to be one to save."""

        @property
        def requested(self):
            self.asked += 1
            return self.asked > 6  # twice a step

        @requested.setter
        def requested(self, value):
            self.asked = 0

    monkeypatch.setattr(fit, "StopRequest", Late)
    summary, _ = train(config(text), tmp_path / "run")
    assert (summary["status"], summary["step"]) == ("interrupted", 3)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000003"]


def test_a_second_ctrl_c_stops_at_once(text, tmp_path, monkeypatch):
    def twice(self, **how):
        asked = signal.getsignal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        while signal.getsignal(signal.SIGINT) == asked:  # two signals before Python looks would count as one
            pass
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run.Trainer, "step", twice)
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits "ignore"
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config(text), tmp_path / "run")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_a_full_disk_is_one_line_and_spares_the_last_checkpoint(finished, text, tmp_path, monkeypatch):
    out, original = tmp_path / "run", run.save

    def full(trainer, *args, **kwargs):
        if trainer.steps_done == 8:
            raise OSError(28, os.strerror(28), "model.safetensors")
        return original(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run, "save", full)
        with pytest.raises(RunFolderError, match="No space left on device") as error:
            train(config(text), out)
    assert "\n" not in str(error.value)
    train(config(text), out, resume=True)
    assert weights(out) == weights(finished[0])
