"""Checkpoints: safetensors and JSON, never pickle; written beside the old ones and renamed into place.

A checkpoint is a folder `step-00000100/` with `model.safetensors` (parameters and buffers, a tied weight once),
`optimizer.safetensors` (everything else that training needs to go on: optimizer, random generators, statistics), where
weights are averaged `ema.safetensors` (the averages of the parameters), and `state.json` (step, times, configuration,
the best evaluation so far, size and sha256 of the other files). The folder gets its name only after all files are on
the disk, so a process killed at any moment leaves the previous checkpoint as it was.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from himoe.errors import CheckpointError, HimoeWarning, RunFolderError
from himoe.files import sync_folder, write_json
from himoe.run_folder import CHECKPOINTS

FORMAT = 1
TEMPORARY = ".tmp-"
MODEL, TRAINER, AVERAGE = PARTS = "model.safetensors", "optimizer.safetensors", "ema.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: tensors of the model and, where read, of the trainer, the averages, and `state.json`."""

    path: Path
    model: dict[str, Tensor]
    trainer: dict[str, Tensor]
    average: dict[str, Tensor] | None
    state: dict[str, Any]

    @property
    def averaged_model(self) -> dict[str, Tensor]:
        """The model's tensors with the averages in place of the parameters, where weights were averaged."""
        return {**self.model, **(self.average or {})}


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    trainer: Mapping[str, Tensor],
    average: Mapping[str, Tensor] | None = None,
    state: Mapping[str, Any],
    keep: int = 2,
    keep_every: int | None = None,
    keep_steps: Collection[int] = (),
) -> Path:
    """Write `folder/step-{step:08}` atomically, delete what need not stay, and return its path.

    The last `keep` up to this one stay, multiples of `keep_every`, and those of `keep_steps`.
    Raises OSError when the disk is full; nothing but a temporary folder is left then, and that is removed.
    """
    target, temporary = folder / f"step-{step:08}", folder / f"{TEMPORARY}step-{step:08}"
    parts = {MODEL: model, TRAINER: trainer} | ({} if average is None else {AVERAGE: average})
    remove_leftovers(folder)
    temporary.mkdir(parents=True)
    try:
        for name, tensors in parts.items():
            _save_tensors(temporary / name, tensors)
        files = {name: _fingerprint(temporary / name) for name in parts}
        write_json(temporary / "state.json", {"format": FORMAT, "step": step, **state, "files": files})
        for name in parts:  # the library makes them private; whoever may read the run may read them
            (temporary / name).chmod((temporary / "state.json").stat().st_mode)
        sync_folder(temporary)
        if target.exists():  # a damaged one, which training has now passed again
            target.rename(folder / f"{TEMPORARY}old-{target.name}")
        temporary.rename(target)
        sync_folder(folder)
    finally:
        remove_leftovers(folder)
    for old in [path for path in list_checkpoints(folder) if step_of(path) <= step][:-keep]:
        if step_of(old) not in keep_steps and (keep_every is None or step_of(old) % keep_every):
            old.rename(folder / f"{TEMPORARY}old-{old.name}")  # a kill while deleting leaves no half checkpoint
    remove_leftovers(folder)
    return target


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # it hides the system's error number in its text
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else error from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def remove_leftovers(folder: Path) -> None:
    """Delete temporary folders that a killed process left behind."""
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders, oldest first."""
    return sorted((p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name)), key=step_of)


def read_state(path: Path, *, check: Collection[str] = PARTS) -> dict[str, Any]:
    """Return a checkpoint's `state.json`, after comparing the files in `check` with the size and sha256 it records.

    Raises CheckpointError naming the first file that is missing or damaged.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in state["files"].items()}
        known = set(files) - {AVERAGE} == {MODEL, TRAINER}
        complete = state["format"] == FORMAT and known and isinstance(state["step"], int)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a checkpoint: it has no state.json") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: state.json cannot be read ({error})") from None
    if not complete:
        raise CheckpointError(f"checkpoint {path} has a form that this version does not read (format {FORMAT})")
    if path.name != f"step-{state['step']:08}":
        raise CheckpointError(f"checkpoint {path} is damaged: its state.json is of step {state['step']}")
    for name, (size, digest) in files.items():
        if name not in check:
            continue
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} is damaged: {name} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} has {file.stat().st_size} bytes, not {size}")
        try:
            found = _fingerprint(file)["sha256"]
        except OSError as error:  # a bad place of the disk
            raise CheckpointError(f"checkpoint {path} is damaged: {name} cannot be read ({error})") from error
        if found != digest:
            raise CheckpointError(f"checkpoint {path} is damaged: the content of {name} does not match its sha256")
    return state


def load_checkpoint(path: Path, *, parts: Collection[str] = PARTS, checked: bool = False) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: its folder.
        parts: the files to read; the averages only where there are some.
        checked: `newest_whole` has just found these files whole, which takes as long as reading them.

    Raises CheckpointError for a missing or damaged file.
    """
    state = read_state(path, check=() if checked else parts)
    try:
        tensors = {name: load_file(path / name) for name in parts if name in state["files"]}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: its tensors cannot be read ({error})") from error
    return Checkpoint(path, tensors[MODEL], tensors.get(TRAINER, {}), tensors.get(AVERAGE), state)


def newest_whole(folder: Path, *, parts: Collection[str] = PARTS) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose `parts` are undamaged, and one line for each newer one that is damaged.

    Returns None when the folder holds no checkpoint. Raises CheckpointError when it holds only damaged ones.
    """
    damage = []
    for path in reversed(list_checkpoints(folder)):
        try:
            read_state(path, check=parts)
        except CheckpointError as error:
            damage.append(str(error))
        else:
            return path, damage
    if damage:
        raise CheckpointError(f"{damage[0]}; no older one is whole: start again with --force, or in another folder")
    return None, []


def open_checkpoint(run: Path, name: str | None = None, *, average: bool = True) -> Checkpoint:
    """Read the model of a checkpoint of a run folder by its name.

    Args:
        run: the run folder.
        name: "last" or None, the newest whole one; "best", the one with the best evaluation during training; or a
            step, as "step-00000100" or "100".
        average: also the averages, where there are some.

    Raises RunFolderError when the run has no checkpoint yet, CheckpointError when it has no such one, or a damaged one.
    """
    folder, parts = run / CHECKPOINTS, (MODEL, AVERAGE) if average else (MODEL,)
    if not (known := list_checkpoints(folder)):
        raise RunFolderError(f"{run} has no checkpoint yet; train on with --resume")
    listed = f"there are {', '.join(path.name for path in known)}"
    if name in (None, "last"):
        return load_checkpoint(_newest(folder, parts), parts=parts, checked=True)
    if name == "best":
        best = read_state(_newest(folder, ()), check=()).get("best")
        if not best:
            raise CheckpointError(f"{run} has no best checkpoint: it has not been evaluated yet; {listed}")
        found = folder / f"step-{best['step']:08}"
        name = f"the best checkpoint, {found.name},"
    else:
        found = folder / (f"step-{int(name):08}" if name.isdecimal() else name)
    if found not in known:
        raise CheckpointError(f"{name} does not exist; {listed}")
    return load_checkpoint(found, parts=parts)


def _newest(folder: Path, parts: Collection[str]) -> Path:
    """Return the newest checkpoint whose `parts` are whole, with a warning for each newer one; there are some."""
    newest, damage = newest_whole(folder, parts=parts)
    assert newest is not None, "there are some"
    for line in damage:
        warnings.warn(f"{line}; an older one is used", HimoeWarning, stacklevel=3)
    return newest


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state with every shared tensor once, under its first name."""
    state = model.state_dict()
    return {name: state[name] for name, first in _first_names(state).items() if name == first}


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Copy `tensors`, as `model_tensors` gave them, into the model.

    Raises CheckpointError naming the tensors that are missing, unknown or of another shape.
    """
    state = model.state_dict()
    first = _first_names(state)
    expected = {name: tuple(state[name].shape) for name in first.values()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [f"{n} is {given.get(n, 'missing')}, the model has {s}" for n, s in expected.items() if given.get(n) != s]
    wrong += [f"{name} is not in the model" for name in given if name not in expected]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"checkpoint {where} is of another model: {'; '.join(wrong[:3])}{more}")
    model.load_state_dict({name: tensors[first[name]] for name in state})


def _first_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Map every name to the first name of the same memory (a tied embedding and head share one)."""
    seen: dict[tuple[int, torch.Size], str] = {}
    return {name: seen.setdefault((t.data_ptr(), t.shape), name) if t.numel() else name for name, t in state.items()}
