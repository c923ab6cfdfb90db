import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny_training import TinyLM, equal, make_trainer, weights

from himoe.errors import CheckpointError
from himoe.train import checkpoint as module
from himoe.train.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_model_tensors,
    model_tensors,
    newest_whole,
    save_checkpoint,
)
from himoe.train.snapshot import check_same_run, restore, save

CONFIG = {"seed": 0, "train": {"steps": 20, "log_every": 5}, "moe": {"options": {"alpha": 0.1}}}


def save_trainer(trainer, folder, keep=2):
    return save(trainer, folder, seconds=1.0, config=CONFIG, data_hash="abc", keep=keep)


def save_plain(folder, step, keep=9):
    tensors = {"x": torch.full((3,), float(step))}
    return save_checkpoint(folder, step, model=tensors, trainer=tensors, state={}, keep=keep)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_resumed_trainer_equals_an_uninterrupted_one_bit_for_bit(tmp_path, stop):
    whole, first = make_trainer(), make_trainer()
    for _ in range(9):
        whole.step()
    for _ in range(stop):
        first.step()
    path = save_trainer(first, tmp_path)
    second = make_trainer(seed=99)  # other weights, another generator state: all must come from the checkpoint
    assert restore(second, path, CONFIG, "abc")["seconds"] == 1.0
    for _ in range(9 - stop):
        second.step()
    assert equal(weights(whole), weights(second))
    assert whole.means.read() == second.means.read()
    assert whole.statistics.read() == second.statistics.read()
    assert (whole.steps_done, whole.tokens_done) == (second.steps_done, second.tokens_done)


def test_the_random_generator_goes_on_where_it_was(tmp_path):
    trainer = make_trainer()
    trainer.step()
    path = save_trainer(trainer, tmp_path)
    expected = torch.rand(3)
    restore(make_trainer(seed=99), path, CONFIG, "abc")
    assert torch.equal(torch.rand(3), expected)


def test_balancer_state_and_optimizer_state_are_in_it(tmp_path):
    trainer = make_trainer()
    trainer.step()
    saved = load_checkpoint(save_trainer(trainer, tmp_path))
    assert any("balancer" in name for name in saved.model)
    assert {"optimizer/embedding.weight/exp_avg", "optimizer/embedding.weight/step", "random/cpu"} <= set(saved.trainer)


def test_a_tied_weight_is_stored_once_and_loaded_twice(tmp_path):
    model, other = TinyLM(), TinyLM()
    tensors = model_tensors(model)
    assert "embedding.weight" in tensors and "head.weight" not in tensors
    load_model_tensors(other, tensors, tmp_path)
    assert torch.equal(other.head.weight, model.embedding.weight)
    assert other.head.weight is other.embedding.weight


def test_nothing_is_pickled(tmp_path):
    path = save_plain(tmp_path, 1)
    assert names(path) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert torch.equal(safetensors.torch.load_file(path / "model.safetensors")["x"], torch.ones(3))
    assert json.loads((path / "state.json").read_text())["step"] == 1


def test_only_the_last_ones_stay(tmp_path):
    for step in (1, 2, 3, 4):
        save_plain(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_steps_are_ordered_by_number(tmp_path):
    for step in (99_999_999, 100_000_000):
        save_plain(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-99999999", "step-100000000"]


def test_a_full_disk_is_an_os_error_and_leaves_no_rubbish(tmp_path, monkeypatch):
    save_plain(tmp_path, 1)

    def full(tensors, path):
        path.write_bytes(b"half")
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError) as error:
        save_plain(tmp_path, 2)
    assert error.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["step-00000001"]


def damage_by_flipping(path):
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)


def damage_by_cutting(path):
    os.truncate(path / "optimizer.safetensors", 10)


def damage_by_deleting(path):
    (path / "model.safetensors").unlink()


def damage_the_state(path):
    (path / "state.json").write_text('{"step": 2')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_by_flipping, "content of model.safetensors"),
        (damage_by_cutting, "optimizer.safetensors has 10 bytes"),
        (damage_by_deleting, "model.safetensors is missing"),
        (damage_the_state, "state.json cannot be read"),
    ],
)
def test_damage_is_named_and_an_older_one_is_found(tmp_path, damage, words):
    old, new = save_plain(tmp_path, 1), save_plain(tmp_path, 2)
    damage(new)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(new)
    found, lines = newest_whole(tmp_path)
    assert found == old
    assert len(lines) == 1 and words in lines[0] and str(new) in lines[0]
    damage(old)
    with pytest.raises(CheckpointError, match="no older one is whole"):
        newest_whole(tmp_path)


def sign(path, name):
    """Write the size and hash that a changed file has now into state.json."""
    state = json.loads((path / "state.json").read_text())
    content = (path / name).read_bytes()
    state["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "state.json").write_text(json.dumps(state))


def test_a_file_of_no_tensors_is_a_damaged_checkpoint(tmp_path):
    path = save_plain(tmp_path, 1)
    (path / "model.safetensors").write_bytes(b"no tensors")
    sign(path, "model.safetensors")
    with pytest.raises(CheckpointError, match="its tensors cannot be read"):
        load_checkpoint(path)


def test_a_checkpoint_of_another_step_than_its_name_says_is_refused(tmp_path):
    path = save_plain(tmp_path, 7).rename(tmp_path / "step-00000009")
    with pytest.raises(CheckpointError, match=r"step-00000009 is damaged: its state\.json is of step 7"):
        load_checkpoint(path)


@pytest.mark.parametrize("key", ["tokens", "seconds", "step_seconds", "threads", "config", "data_hash"])
def test_a_state_without_what_a_run_needs_is_refused(tmp_path, key):
    path = save_trainer(make_trainer(), tmp_path)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, key: None}))
    with pytest.raises(CheckpointError, match=rf"damaged: state\.json holds no valid {key}"):
        restore(make_trainer(), path, CONFIG, "abc")


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_moments_of_another_shape_are_refused(tmp_path, moment):
    trainer = make_trainer()
    trainer.step()
    trainer.optimizer.state[trainer.model.norm.weight][moment] = torch.zeros(7)
    path = save_trainer(trainer, tmp_path)
    with pytest.raises(CheckpointError, match=rf"optimizer/norm\.weight/{moment} is \(7,\), its parameter \(16,\)"):
        restore(make_trainer(), path, CONFIG, "abc")


def test_a_damaged_checkpoint_is_replaced_when_training_passes_it_again(tmp_path):
    save_plain(tmp_path, 1)
    damage_by_cutting(save_plain(tmp_path, 2))
    save_plain(tmp_path, 2)
    assert newest_whole(tmp_path) == (tmp_path / "step-00000002", [])
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_damaged_newer_one_does_not_push_the_good_one_out(tmp_path):
    save_plain(tmp_path, 1, keep=1)
    damage_by_cutting(save_plain(tmp_path, 5))
    save_plain(tmp_path, 2, keep=1)
    assert newest_whole(tmp_path)[0] == tmp_path / "step-00000002"


def test_a_file_that_the_disk_cannot_read_is_damage(tmp_path, monkeypatch):
    save_plain(tmp_path, 1)
    save_plain(tmp_path, 2)
    digest = hashlib.file_digest

    def unreadable(file, name):
        if "step-00000002" in file.name:
            raise OSError(5, os.strerror(5))
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", unreadable)
    newest, damage = newest_whole(tmp_path)
    assert newest == tmp_path / "step-00000001"
    assert len(damage) == 1 and "step-00000002 is damaged: model.safetensors cannot be read" in damage[0]


def test_no_checkpoint_is_none_and_no_folder_is_an_error(tmp_path):
    assert newest_whole(tmp_path / "nowhere") == (None, [])
    with pytest.raises(CheckpointError, match=r"not a checkpoint: it has no state\.json"):
        load_checkpoint(tmp_path / "step-00000007")


def test_another_model_is_refused_by_name(tmp_path):
    tensors = model_tensors(TinyLM())
    tensors["norm.weight"] = torch.ones(7)
    tensors["extra"] = torch.ones(1)
    with pytest.raises(
        CheckpointError, match=r"norm\.weight is \(7,\), the model has \(16,\); extra is not in the model"
    ):
        load_model_tensors(TinyLM(), tensors, tmp_path)


@pytest.mark.parametrize(
    ("config", "data_hash", "words"),
    [
        ({**CONFIG, "seed": 1}, "abc", "seed was 0, now 1"),
        ({**CONFIG, "train": {"steps": 30, "log_every": 5}}, "abc", r"train\.steps was 20, now 30"),
        ({**CONFIG, "moe": {"options": {"alpha": 0.2}}}, "abc", r"moe\.options\.alpha was 0\.1, now 0\.2"),
        ({**CONFIG, "seed": 1}, "abc", "go on with the values that it was trained with, or start a new run"),
        (CONFIG, "abd", "other text"),
    ],
)
def test_a_foreign_checkpoint_is_refused_with_what_differs(config, data_hash, words):
    state = {"step": 4, "config": CONFIG, "data_hash": "abc"}
    with pytest.raises(CheckpointError, match=words):
        check_same_run(Path("run/checkpoints/step-00000004"), state, config, data_hash)


def test_how_often_to_log_may_change(tmp_path):
    state = {"step": 4, "config": CONFIG, "data_hash": "abc"}
    check_same_run(tmp_path, state, {**CONFIG, "train": {"steps": 20, "log_every": 1}}, "abc")
