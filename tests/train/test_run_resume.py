"""What may go on from a checkpoint, and what may not."""

import json
import os

import pytest
from run_case import SHORT, config, lines, read, timeless, train, weights

from himoe import trained
from himoe.errors import CheckpointError, RunFolderError
from himoe.train.snapshot import FREE_KEYS


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


def test_what_may_change_on_resume_are_keys_of_the_configuration(text):
    tree = config(text).model_dump()
    for key in FREE_KEYS - {"name"}:
        section, _, leaf = key.partition(".")
        assert leaf in tree[section], key
    assert {"name"} <= FREE_KEYS and "name" in tree
