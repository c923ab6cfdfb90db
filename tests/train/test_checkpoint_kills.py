"""A process that dies while it writes a checkpoint, or deletes those that need not stay."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

import torch

from himoe.train import checkpoint as module
from himoe.train.checkpoint import list_checkpoints, load_checkpoint, newest_whole, save_checkpoint


class Killed(BaseException):
    """The end of a process: from here on it changes nothing on the disk."""


def kill_at(patch, count):
    """Let the process end where it is about to change the disk for the `count`th time."""
    left = [count]

    def mortal(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] <= 0:
                raise Killed
            return function(*args, **kwargs)

        return call

    places = [(os, "fsync"), (os, "unlink"), (os, "rmdir"), (module, "save_file")]
    for owner, name in [*places, *((Path, name) for name in ("mkdir", "rename", "replace", "chmod", "unlink"))]:
        patch.setattr(owner, name, mortal(getattr(owner, name)))


def save(folder, step, best):
    tensors = {"x": torch.full((3,), float(step))}
    files = {"model": tensors, "trainer": tensors, "average": tensors}
    return save_checkpoint(folder, step, **files, state={"best": best}, keep=1, keep_steps={best})


def test_a_kill_at_any_moment_leaves_the_previous_one_and_the_best_one_whole(tmp_path, monkeypatch):
    save(tmp_path / "before", 1, best=1)
    save(tmp_path / "before", 2, best=1)
    found, done, count = [], False, 0
    while not done:
        count += 1
        folder = shutil.copytree(tmp_path / "before", tmp_path / str(count))
        with monkeypatch.context() as patch:
            kill_at(patch, count)
            with suppress(Killed):
                done = bool(save(folder, 3, best=3))  # when it is there, both others may go
        whole = {path.name: load_checkpoint(path) for path in list_checkpoints(folder)}  # none is half deleted
        path, _ = newest_whole(folder)
        assert f"step-{whole[path.name].state['best']:08}" in whole, count
        found.append(int(path.name[-8:]))
        save(folder, 4, best=3)
        kept = ["step-00000003", "step-00000004"] if path.name == "step-00000003" else ["step-00000004"]
        assert sorted(path.name for path in folder.iterdir()) == kept, count
    assert found == sorted(found) and {2, 3} == set(found) and found.count(3) > 5
