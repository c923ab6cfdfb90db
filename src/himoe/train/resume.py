"""A run's checkpoints: what goes into one, whether one belongs to this run, and how everything is put back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from himoe.errors import CheckpointError
from himoe.run_folder import LOGS, truncate_log
from himoe.train.checkpoint import load_checkpoint, load_model_tensors, model_tensors, save_checkpoint
from himoe.train.loop import Trainer
from himoe.train.state import load_trainer_tensors, trainer_tensors

# What may differ between the processes of one run, because it does not change what is computed, or only its rounding.
FREE_KEYS = {
    "name",
    "data.path",  # the content decides, by its hash
    "data.eval_tokens",
    "moe.backend",
    "moe.force",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.threads",
}


def save(
    trainer: Trainer, folder: Path, *, seconds: float, config: Mapping[str, Any], data_hash: str, keep: int
) -> Path:
    """Write a checkpoint of `trainer` into `folder`, at a step boundary; `seconds` is the training time so far."""
    return save_checkpoint(
        folder,
        trainer.steps_done,
        model=model_tensors(trainer.model),
        trainer=trainer_tensors(trainer),
        state={
            "tokens": trainer.tokens_done,
            "seconds": seconds,
            "step_seconds": trainer.step_seconds,
            "threads": torch.get_num_threads(),
            "config": config,
            "data_hash": data_hash,
        },
        keep=keep,
    )


def check_same_run(path: Path, state: Mapping[str, Any], config: Mapping[str, Any], data_hash: str) -> None:
    """Raise CheckpointError, naming each difference, unless the checkpoint is of this configuration and this text."""
    saved, given = _flatten(state.get("config", {})), _flatten(config)
    different = [key for key in sorted(saved.keys() | given.keys()) if saved.get(key) != given.get(key)]
    wrong = [f"{key} was {saved.get(key)!r}, now {given.get(key)!r}" for key in different if key not in FREE_KEYS]
    if wrong:
        raise CheckpointError(
            f"checkpoint {path} is of another configuration: {'; '.join(wrong)}; resume with the config.json of its run"
        )
    if state.get("data_hash") != data_hash:
        raise CheckpointError(
            f"checkpoint {path} was trained on other text: its hash was {str(state.get('data_hash'))[:12]}, "
            f"now {data_hash[:12]}; resume with the same data"
        )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"train.steps": 20, …}`, tables inside tables too."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def restore(trainer: Trainer, path: Path, config: Mapping[str, Any], data_hash: str) -> dict[str, Any]:
    """Put a checkpoint into the trainer and its model; return its `state.json`.

    Raises CheckpointError when it is damaged, of another run, or does not fit the model.
    """
    checkpoint = load_checkpoint(path)
    check_same_run(path, checkpoint.state, config, data_hash)
    load_model_tensors(trainer.model, checkpoint.model, path)
    try:
        load_trainer_tensors(trainer, checkpoint.trainer)
        trainer.steps_done, trainer.tokens_done = checkpoint.state["step"], checkpoint.state["tokens"]
        trainer.step_seconds = checkpoint.state["step_seconds"]
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {path} does not fit this version's trainer: {error}") from error
    return checkpoint.state


def rewind_logs(folder: Path, step: int, last_step: int) -> None:
    """Cut the logs back to `step`. The evaluation of the run's last step goes too: it will be made again."""

    def keep(line: dict[str, Any]) -> bool:
        return line["step"] <= step and not (line.get("kind") == "eval" and line["step"] == last_step)

    for name in LOGS:
        truncate_log(folder / name, keep)
    (folder / "summary.json").unlink(missing_ok=True)
