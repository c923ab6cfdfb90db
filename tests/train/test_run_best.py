"""Which checkpoints stay, when a run ends early, and which weights are evaluated."""

import signal

import pytest
import safetensors.torch
from run_case import checkpoints, config, lines, read, timeless, train, weights
from test_run_stops import interrupt_after

from himoe import run, trained
from himoe.errors import CheckpointError, HimoeWarning, RunFolderError
from himoe.train import checkpoint
from himoe.train.alarms import Alarm, Alarms
from himoe.train.checkpoint import open_checkpoint

EVERY_STEP = ["train.eval_every=1", "train.checkpoint_every=100", "train.keep_checkpoints=1", "data.eval_tokens=64"]


@pytest.fixture
def scores(monkeypatch):
    """Replace every evaluation by the bits per byte that stand here for its step."""
    bits, original = {}, run._Run._evaluate

    def evaluate(self, num_tokens):
        found = {"domains": {}, "loss": 1.0, "bits_per_byte": bits[self.trainer.steps_done]}
        monkeypatch.setattr(run, "score", lambda *_: found)
        return original(self, num_tokens)

    monkeypatch.setattr(run._Run, "_evaluate", evaluate)
    return bits


def say(scores, *bits):
    scores.update(enumerate(bits, 1))


def test_the_best_checkpoint_stays_beside_the_last(scores, text, tmp_path):
    say(scores, 5.0, 4.0, 3.0, 3.0, 6.0, 4.0, 8.0, 3.5)
    summary, _ = train(config(text, *EVERY_STEP), tmp_path)
    assert checkpoints(tmp_path) == [3, 8]
    assert summary["best"] == {"step": 3, "bits_per_byte": 3.0, "evaluations_since": 5}
    assert open_checkpoint(tmp_path, "best").path.name == "step-00000003"
    assert {open_checkpoint(tmp_path, name).path.name for name in ("last", None, "8")} == {"step-00000008"}


def test_the_last_step_may_be_the_best(scores, text, tmp_path):
    say(scores, 5.0, 4.0, 3.0, 3.0, 6.0, 4.0, 8.0, 2.0)
    summary, _ = train(config(text, *EVERY_STEP), tmp_path)
    assert checkpoints(tmp_path) == [8] and summary["best"]["step"] == 8
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl") if line["kind"] == "eval"] == [*range(1, 9)]


def test_multiples_stay_for_good(scores, text, tmp_path):
    say(scores, *[5.0] * 8)
    sets = ["train.checkpoint_every=1", "train.keep_every=3", "train.keep_checkpoints=2"]
    train(config(text, *EVERY_STEP, *sets), tmp_path)
    assert checkpoints(tmp_path) == [1, 3, 6, 7, 8]  # 1 is the best: the earliest of equal ones


def test_the_best_need_not_stay(scores, text, tmp_path):
    say(scores, 1.0, *[5.0] * 7)
    train(config(text, *EVERY_STEP, "train.keep_best=false"), tmp_path)
    assert checkpoints(tmp_path) == [8]
    with pytest.raises(CheckpointError, match=r"^the best checkpoint, step-00000001, does not exist; there are step-"):
        open_checkpoint(tmp_path, "best")


def test_a_run_without_an_evaluation_has_no_best(text, tmp_path, monkeypatch):
    with pytest.raises(RunFolderError, match="has no checkpoint yet"):
        open_checkpoint(tmp_path, "best")
    interrupt_after(monkeypatch, signal.SIGINT, 2)
    summary, _ = train(config(text), tmp_path)
    assert summary["best"] is None
    with pytest.raises(CheckpointError, match="has no best checkpoint: it has not been evaluated yet; there are step-"):
        open_checkpoint(tmp_path, "best")


def test_a_run_ends_after_evaluations_that_bring_nothing(scores, text, tmp_path):
    say(scores, 5.0, 4.0, 4.5, 3.0, 3.1, 3.2, 1.0, 1.0)
    summary, _ = train(config(text, *EVERY_STEP, "train.early_stop=2"), tmp_path)
    assert (summary["status"], summary["step"], summary["best"]["step"]) == ("stopped early", 6, 4)
    assert checkpoints(tmp_path) == [4, 6]
    final = lines(tmp_path / "metrics.jsonl")[-1]
    assert (final["step"], final["final"]) == (6, True)


def test_an_evaluation_of_no_bytes_is_neither_the_best_nor_a_reason_to_stop(scores, text, tmp_path):
    say(scores, None, None, None, 5.0, None, 4.0, None, None)
    summary, printed = train(config(text, *EVERY_STEP, "train.early_stop=2"), tmp_path)
    assert (summary["status"], summary["bits_per_byte"]) == ("finished", None)
    assert summary["best"] == {"step": 6, "bits_per_byte": 4.0, "evaluations_since": 0}
    assert "held-out bits per byte –" in printed


def test_patience_survives_a_stop(scores, text, tmp_path, monkeypatch):
    say(scores, 5.0, 6.0, 7.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    sets = [*EVERY_STEP, "train.early_stop=2"]
    with monkeypatch.context() as patch:
        interrupt_after(patch, signal.SIGINT, 2)
        assert train(config(text, *sets), tmp_path)[0]["status"] == "interrupted"
    summary, _ = train(config(text, *sets), tmp_path, resume=True)
    assert (summary["status"], summary["step"], summary["best"]["step"]) == ("stopped early", 3, 1)
    logged = timeless(lines(tmp_path / "metrics.jsonl"))
    again, _ = train(config(text, *sets), tmp_path, resume=True)
    assert (again["status"], again["step"]) == ("stopped early", 3)
    assert timeless(lines(tmp_path / "metrics.jsonl")) == logged
    longer, _ = train(config(text, *EVERY_STEP), tmp_path, resume=True)
    assert (longer["status"], longer["step"], longer["best"]["step"]) == ("finished", 8, 4)


def test_other_tokens_make_a_new_search_for_the_best(scores, text, tmp_path, monkeypatch):
    say(scores, 1.0, *[5.0] * 7)
    with monkeypatch.context() as patch:
        interrupt_after(patch, signal.SIGINT, 2)
        train(config(text, *EVERY_STEP), tmp_path)
    summary, printed = train(config(text, *EVERY_STEP, "data.eval_tokens=65"), tmp_path, resume=True)
    assert "looking for the best evaluation from here on" in printed and summary["best"]["step"] == 3


def test_averaged_weights_are_evaluated_and_training_goes_on_with_its_own(finished, text, tmp_path):
    summary, _ = train(config(text, "train.ema_decay=0.9"), tmp_path)
    assert weights(tmp_path) == weights(finished[0])
    evaluations = [line for line in lines(tmp_path / "metrics.jsonl") if line["kind"] == "eval"]
    assert [line["weights"] for line in evaluations] == ["averaged", "averaged"]
    plain = [line for line in lines(finished[0] / "metrics.jsonl") if line["kind"] == "eval"]
    assert all(one["loss"] != other["loss"] for one, other in zip(evaluations, plain, strict=True))
    average = safetensors.torch.load_file(tmp_path / "checkpoints/step-00000008/ema.safetensors")
    model = safetensors.torch.load_file(tmp_path / "checkpoints/step-00000008/model.safetensors")
    assert average.keys() < model.keys() and not any("balancer" in name for name in average)
    assert trained.evaluate(tmp_path)["bits_per_byte"] == summary["bits_per_byte"]
    assert trained.evaluate(tmp_path, ema=False)["bits_per_byte"] == plain[-1]["bits_per_byte"]


def set_off_at(monkeypatch, step, kind):
    """Let an alarm go off at a step."""

    def check(self, line, layers, **how):
        return [Alarm(kind, step, None, "something is wrong")] if line["step"] == step else []

    monkeypatch.setattr(Alarms, "check", check)


def test_an_alarm_is_told_and_stops_a_run_that_asks_for_it(finished, text, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        set_off_at(patch, 6, "router_collapse")
        summary, printed = train(config(text), tmp_path / "goes_on")
        assert summary["status"] == "finished" and "alarm: something is wrong" in printed
        stops = config(text, "train.stop_on_alarm=true")
        summary, printed = train(stops, tmp_path / "stops")
        assert (summary["status"], summary["step"]) == ("stopped by an alarm", 6)
        assert "stopped by an alarm and saved at step 6; go on with --resume" in printed
    train(stops, tmp_path / "stops", resume=True)
    assert weights(tmp_path / "stops") == weights(tmp_path / "goes_on") == weights(finished[0])


def test_an_alarm_that_spoils_nothing_stops_no_run(text, tmp_path, monkeypatch):
    set_off_at(monkeypatch, 6, "slow_data")
    summary, printed = train(config(text, "train.stop_on_alarm=true"), tmp_path)
    assert summary["status"] == "finished" and "alarm: something is wrong" in printed


def test_divergence_is_an_alarm_in_the_log(text, tmp_path, monkeypatch):
    step = run.Trainer.step

    def broken(self, **how):
        if self.steps_done == 3:
            self.model.norm.weight.data[0] = float("inf")
        step(self, **how)

    monkeypatch.setattr(run.Trainer, "step", broken)
    with pytest.raises(run.HimoeError, match=r"diverged at step 4.*norm\.weight"):
        train(config(text), tmp_path)
    last = lines(tmp_path / "metrics.jsonl")[-1]
    assert (last["kind"], last["alarm"], last["step"]) == ("alarm", "not_finite", 4)
    assert not (tmp_path / "summary.json").exists() and read(tmp_path / "config.json")


@pytest.mark.parametrize(("sets", "number"), [((), 4), (("train.eval_every=100",), 8)], ids=["on the way", "last"])
def test_divergence_that_an_evaluation_finds_is_an_alarm_too(text, tmp_path, monkeypatch, sets, number):
    step = run.Trainer.step

    def broken(self, **how):
        step(self, **how)
        if self.steps_done == number:
            self.model.blocks[1].attention.out_proj.weight.data[0] = float("nan")

    monkeypatch.setattr(run.Trainer, "step", broken)
    with pytest.raises(run.HimoeError, match=rf"by step {number}: the held-out loss is nan \(first not finite: .*1\)"):
        train(config(text, *sets), tmp_path)
    last = lines(tmp_path / "metrics.jsonl")[-1]
    assert (last["kind"], last["alarm"], last["layer"], last["step"]) == ("alarm", "not_finite", 1, number)
    assert "the weight of blocks.1.attention.out_proj.weight" in last["text"]
    assert not (tmp_path / f"checkpoints/step-{number:08}").exists()


def test_a_damaged_newest_checkpoint_is_named_where_an_older_one_is_used(text, tmp_path):
    train(config(text, "train.checkpoint_every=4"), tmp_path)
    with (tmp_path / "checkpoints" / "step-00000008" / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.warns(HimoeWarning, match=r"step-00000008 is damaged: .*; an older one is used"):
        assert open_checkpoint(tmp_path).path.name == "step-00000004"


def test_only_what_is_read_need_be_whole(text, tmp_path):
    train(config(text, "train.ema_decay=0.9"), tmp_path)
    newest = tmp_path / "checkpoints/step-00000008"
    (newest / "optimizer.safetensors").write_bytes(b"")
    assert trained.load_run(tmp_path).step == 8
    (newest / "ema.safetensors").write_bytes(b"")
    assert trained.load_run(tmp_path, ema=False).step == 8
    with pytest.warns(HimoeWarning, match=r"ema\.safetensors has 0 bytes"):
        assert trained.load_run(tmp_path).step == 4
    with pytest.raises(CheckpointError, match=r"ema\.safetensors has 0 bytes"):
        trained.load_run(tmp_path, "8")
    (newest / "state.json").unlink()
    with pytest.warns(HimoeWarning, match=r"it has no state\.json; an older one is used"):
        assert trained.load_run(tmp_path, "best").step == 4


@pytest.mark.parametrize("name", [None, "best", "8"])
def test_every_file_that_is_read_is_checked_once(text, tmp_path, monkeypatch, name):
    out, seen, fingerprint = tmp_path / "run", [], checkpoint._fingerprint
    train(config(text, "train.ema_decay=0.9"), out)
    monkeypatch.setattr(checkpoint, "_fingerprint", lambda path: seen.append(path.name) or fingerprint(path))
    trained.load_run(out, name)
    assert sorted(seen) == ["ema.safetensors", "model.safetensors"]
    seen.clear()
    trained.load_run(out, name, ema=False)
    assert seen == ["model.safetensors"]
    seen.clear()
    train(config(text, "train.ema_decay=0.9"), out, resume=True)
    assert sorted(seen) == ["ema.safetensors", "model.safetensors", "optimizer.safetensors"]
