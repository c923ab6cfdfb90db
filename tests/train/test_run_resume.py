"""What may go on from a checkpoint, and what may not."""

import json
import os
import shutil

import pytest
import safetensors.torch
from run_case import SHORT, checkpoints, config, lines, read, timeless, train, weights

from himoe import trained
from himoe.errors import CheckpointError, RunFolderError
from himoe.train.snapshot import FREE_KEYS, SCHEDULE_KEYS


def test_a_finished_run_can_be_resumed_without_harm(finished, text):
    out, before, _ = finished
    content, logged = weights(out), timeless(lines(out / "metrics.jsonl"))
    summary, _ = train(config(text), out, resume=True)
    assert weights(out) == content and timeless(lines(out / "metrics.jsonl")) == logged
    assert summary["domains"] == before["domains"] and summary["layers"] == before["layers"]


def test_resuming_leaves_the_tokenizer_alone(text, tmp_path, monkeypatch):
    train(config(text, *SHORT), tmp_path)
    before = (tmp_path / "tokenizer.json").stat()
    train(config(text, *SHORT), tmp_path, resume=True)
    after = (tmp_path / "tokenizer.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_run_keeps_its_id_under_another_name_and_in_another_folder(text, tmp_path):
    ids = []
    for name in ("one", "two"):
        train(config(text, *SHORT), tmp_path / name)
        ids.append(read(tmp_path / name / "env.json")["id"])
    assert ids[0] != ids[1] and all(run_id.startswith("lm_tiny-") for run_id in ids)
    (tmp_path / "one").rename(tmp_path / "moved")
    train(config(text, *SHORT, "name=another"), tmp_path / "moved", resume=True)
    assert read(tmp_path / "moved/env.json")["id"] == ids[0]


def test_a_damaged_environment_is_one_line(text, tmp_path):
    train(config(text, *SHORT), tmp_path)
    env = read(tmp_path / "env.json")
    del env["baselines"]
    (tmp_path / "env.json").write_text(json.dumps(env))
    with pytest.raises(RunFolderError, match="holds no baselines"):
        train(config(text, *SHORT), tmp_path, resume=True)
    with pytest.raises(RunFolderError, match="holds no baselines"):
        trained.evaluate(tmp_path)


def test_resume_without_a_checkpoint_starts_anew(finished, text, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "metrics.jsonl").write_text('{"kind": "train", "step": 3}\n')
    _, printed = train(config(text), out, resume=True)
    assert "no checkpoint yet" in printed and weights(out) == weights(finished[0])
    assert timeless(lines(out / "metrics.jsonl")) == timeless(lines(finished[0] / "metrics.jsonl"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(finished, text, tmp_path):
    out = tmp_path / "run"
    train(config(text), out)
    os.truncate(out / "checkpoints/step-00000008/model.safetensors", 100)
    summary, printed = train(config(text), out, resume=True)
    assert "step-00000008 is damaged" in printed and "going back to step-00000004" in printed
    assert summary["status"] == "finished" and weights(out) == weights(finished[0])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ("train.learning_rate=1e-4", CheckpointError, r"train\.learning_rate was 0\.003, now 0\.0001"),
        ("model.dim=64", CheckpointError, r"model\.dim was 32, now 64"),
        ("data.held_out=0.2", CheckpointError, r"data\.held_out was 0\.1, now 0\.2"),
    ],
)
def test_another_configuration_cannot_resume_it(finished, text, change, error, words):
    before = {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")}
    with pytest.raises(error, match=words):
        train(config(text, change), finished[0], resume=True)
    assert {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")} == before


def test_other_text_cannot_resume_it(finished, tmp_path):
    (tmp_path / "other.txt").write_text("\n\n".join(f"other words {i}" * 20 for i in range(300)))
    with pytest.raises(CheckpointError, match="trained on other text"):
        train(config(tmp_path / "other.txt"), finished[0], resume=True)


@pytest.fixture(scope="module")
def stopped(text, tmp_path_factory):
    """Return a copy of a run that was stopped at step 4 of 8, with the values given."""

    def make(*sets):
        out = tmp_path_factory.mktemp("runs") / "stopped"
        train(config(text, *sets), out)
        shutil.rmtree(out / "checkpoints/step-00000008")
        return out

    return make


def farthest(one, other):
    """Return the largest difference of any weight or balancer state of two checkpoints."""
    left, right = (safetensors.torch.load(content) for content in (one, other))
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


def test_what_does_not_change_the_results_may_change_on_resume(finished, stopped, text):
    sets = ["train.recompute=full", "train.log_every=1", "train.eval_every=2", "train.keep_checkpoints=1"]
    out = stopped()
    train(config(text, *sets, "train.keep_best=false"), out, resume=True)
    assert weights(out) == weights(finished[0]) and checkpoints(out) == [8]
    assert read(out / "config.json")["train"]["recompute"] == "full"


def test_other_micro_batches_give_the_same_weights_but_for_rounding_where_losses_are_linear(stopped, text, tmp_path):
    sets = ["moe.preset=loss_free"]
    out = stopped(*sets)
    before = weights(out, 4)
    train(config(text, *sets), tmp_path / "whole")
    train(config(text, *sets, "train.accumulate=4"), out, resume=True)
    assert farthest(weights(out), weights(tmp_path / "whole")) < 1e-5 < farthest(weights(out), before)


def test_other_micro_batches_change_losses_that_see_their_micro_batch_alone(finished, stopped, text):
    out = stopped()  # hi_moe has the load-balancing loss of switch
    train(config(text, "train.accumulate=8"), out, resume=True)
    assert 1e-7 < farthest(weights(out), weights(finished[0])) < 0.01


@pytest.mark.parametrize("schedule", ["constant", "inverse_sqrt"])
def test_a_finished_run_can_be_made_longer(text, tmp_path, schedule):
    sets = [f"train.schedule={schedule}"]
    train(config(text, *sets, "train.steps=4"), tmp_path / "short")
    summary, _ = train(config(text, *sets, "train.steps=6"), tmp_path / "short", resume=True)
    train(config(text, *sets, "train.steps=6"), tmp_path / "long")
    assert weights(tmp_path / "short", 6) == weights(tmp_path / "long", 6)
    assert (summary["status"], summary["step"]) == ("finished", 6)
    assert [line["step"] for line in lines(tmp_path / "short/metrics.jsonl") if line.get("final")] == [6]


def test_a_constant_rate_can_be_followed_by_a_decay(text, tmp_path):
    train(config(text, "train.schedule=constant", "train.steps=4"), tmp_path / "run")
    sets = ["train.schedule=wsd", "train.decay_fraction=0.25"]
    train(config(text, *sets), tmp_path / "run", resume=True)
    train(config(text, *sets), tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_schedule_that_would_have_gone_another_way_is_refused(finished, text):
    words = r"train\.steps was 8, now 12, which would have changed the learning rate of steps up to 8; go on with"
    with pytest.raises(CheckpointError, match=words):
        train(config(text, "train.steps=12"), finished[0], resume=True)
    with pytest.raises(CheckpointError, match=r"train\.schedule was 'cosine', now 'linear'"):
        train(config(text, "train.schedule=linear"), finished[0], resume=True)


def test_no_run_ends_before_its_checkpoint(text, tmp_path):
    sets = ["train.schedule=constant"]
    train(config(text, *sets), tmp_path)
    with pytest.raises(CheckpointError, match=r"beyond train\.steps = 6; train\.steps must be at least 8"):
        train(config(text, *sets, "train.steps=6"), tmp_path, resume=True)


def test_what_may_change_on_resume_are_keys_of_the_configuration(text):
    tree = config(text).model_dump()
    for key in (FREE_KEYS | SCHEDULE_KEYS) - {"name"}:
        section, _, leaf = key.partition(".")
        assert leaf in tree[section], key
    assert {"name"} <= FREE_KEYS and "name" in tree
