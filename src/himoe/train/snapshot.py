"""A run's checkpoints: what goes into one, whether one belongs to this run, and how everything is put back.

Beside its model's tensors a trainer must remember, as one flat dictionary: `optimizer/<parameter>/<name>` the
optimizer's state by parameter name · `random/<device>` the states of torch's generators · `statistics/…`, `means/…`
and `monitor/…` what has been accumulated for log lines to come. Learning rates, data position and epoch are functions
of the step and need no place here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from himoe.errors import CheckpointError
from himoe.run_folder import LOGS, truncate_log
from himoe.train.best import Best
from himoe.train.checkpoint import load_checkpoint, load_model_tensors, model_tensors, save_checkpoint
from himoe.train.environment import kernels
from himoe.train.loop import Trainer
from himoe.train.schedule import schedule_of

# What may differ between the processes of one run, because it does not change what is computed, or only its rounding.
FREE_KEYS = {
    "name",
    "data.path",  # the content decides, by its hash
    "data.sources",
    "data.tokenizer",
    "data.workers",
    "data.eval_tokens",
    "moe.backend",
    "moe.force",
    "moe.allow_non_causal",
    "train.accumulate",
    "train.recompute",
    "train.compile",
    "train.threads",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.keep_best",
    "train.early_stop",
    "train.stop_on_alarm",
    "train.log_to",
}

# These may differ too, where every step so far has had the learning rate that it would have had with the new values.
SCHEDULE_KEYS = {
    "train.steps",
    "train.learning_rate",
    "train.min_learning_rate_ratio",
    "train.warmup_steps",
    "train.schedule",
    "train.decay_fraction",
}

# What `save` records beside the step.
STATE = {
    "tokens": int,
    "seconds": int | float,
    "step_seconds": int | float,
    "threads": int,
    "config": Mapping,
    "data_hash": str,
}


def save(
    trainer: Trainer,
    folder: Path,
    *,
    seconds: float,
    config: Mapping[str, Any],
    data_hash: str,
    best: Best | None = None,
    keep: int = 2,
    keep_every: int | None = None,
    keep_best: bool = True,
) -> Path:
    """Write a checkpoint of `trainer` into `folder`, at a step boundary; `seconds` is the training time so far."""
    best = best or Best()
    return save_checkpoint(
        folder,
        trainer.steps_done,
        model=model_tensors(trainer.model),
        trainer=_trainer_tensors(trainer),
        average=trainer.ema.tensors() if trainer.ema else None,
        state={
            "tokens": trainer.tokens_done,
            "seconds": seconds,
            "step_seconds": trainer.step_seconds,
            "threads": torch.get_num_threads(),
            "kernels": kernels(trainer.model, trainer.precision),
            "best": best.record(),
            "config": config,
            "data_hash": data_hash,
        },
        keep=keep,
        keep_every=keep_every,
        keep_steps={best.step} if keep_best and best.step is not None else (),
    )


def check_same_run(path: Path, state: Mapping[str, Any], config: Mapping[str, Any], data_hash: str) -> None:
    """Raise CheckpointError, naming each difference, unless the checkpoint is of this configuration and this text."""
    saved, given = _flatten(state.get("config", {})), _flatten(config)
    different = [key for key in sorted(saved.keys() | given.keys()) if saved.get(key) != given.get(key)]
    wrong = [key for key in different if key not in FREE_KEYS | SCHEDULE_KEYS]
    schedule = [key for key in different if key in SCHEDULE_KEYS]
    if schedule and not _same_rates_until(state["step"], saved, given):
        wrong += schedule
    if wrong:
        named = "; ".join(f"{key} was {saved.get(key)!r}, now {given.get(key)!r}" for key in wrong)
        why = ""
        if schedule and set(wrong) == set(schedule):
            why = f", which would have changed the learning rate of steps up to {state['step']}"
        raise CheckpointError(
            f"checkpoint {path} is of another configuration: {named}{why}; go on with the values that it was trained "
            "with, or start a new run"
        )
    if given.get("train.steps", state["step"]) < state["step"]:
        raise CheckpointError(
            f"checkpoint {path} is beyond train.steps = {given['train.steps']}; train.steps must be at least "
            f"{state['step']}"
        )
    if state.get("data_hash") != data_hash:
        raise CheckpointError(
            f"checkpoint {path} was trained on other text: its hash was {str(state.get('data_hash'))[:12]}, "
            f"now {data_hash[:12]}; resume with the same data"
        )


def _same_rates_until(step: int, *configs: Mapping[str, Any]) -> bool:
    """Return whether the learning rates of steps 1 … `step` are the same with both configurations, bit for bit."""
    try:
        one, other = (schedule_of({key.rpartition(".")[2]: config[key] for key in SCHEDULE_KEYS}) for config in configs)
    except KeyError:
        return False
    return all(one(number) == other(number) for number in range(1, step + 1))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"train.steps": 20, …}`, tables inside tables too, but a table that is free as one value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        deeper = isinstance(value, Mapping) and name not in FREE_KEYS
        flat |= _flatten(value, f"{name}.") if deeper else {name: value}
    return flat


def restore(
    trainer: Trainer, path: Path, config: Mapping[str, Any], data_hash: str, *, checked: bool = False
) -> dict[str, Any]:
    """Put a checkpoint into the trainer and its model; return its `state.json`. `checked` is as for `load_checkpoint`.

    Raises CheckpointError when it is damaged, of another run, or does not fit the model.
    """
    checkpoint = load_checkpoint(path, checked=checked)
    _check_state(path, checkpoint.state)
    check_same_run(path, checkpoint.state, config, data_hash)
    load_model_tensors(trainer.model, checkpoint.model, path)
    try:
        _load_trainer_tensors(trainer, checkpoint.trainer)
        trainer.steps_done, trainer.tokens_done = checkpoint.state["step"], checkpoint.state["tokens"]
        trainer.step_seconds = checkpoint.state["step_seconds"]
        if trainer.ema:
            trainer.ema.load_tensors(checkpoint.average or {}, updates=trainer.steps_done)
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} does not fit this version's trainer: {error}") from error
    return checkpoint.state


def _check_state(path: Path, state: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless everything that `save` recorded is there."""
    if wrong := [key for key, kind in STATE.items() if not isinstance(state.get(key), kind)]:
        raise CheckpointError(f"checkpoint {path} is damaged: state.json holds no valid {', '.join(wrong)}")


def rewind_logs(folder: Path, step: int) -> None:
    """Cut the logs back to `step`, without the final evaluation: it will be made again at the end."""
    for name in LOGS:
        truncate_log(folder / name, lambda line: line["step"] <= step and not line.get("final"))
    (folder / "summary.json").unlink(missing_ok=True)


def _trainer_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Return the state at a step boundary."""
    parts = {
        "optimizer": _optimizer_tensors(trainer),
        "random": _random_tensors(),
        "statistics": trainer.statistics.tensors(),
        "means": trainer.means.tensors(),
        "monitor": trainer.monitor.tensors(),
    }
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def _load_trainer_tensors(trainer: Trainer, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `_trainer_tensors` returned; the parameters are those of the model in `trainer`."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(f"{prefix}/"): t for n, t in tensors.items() if n.startswith(f"{prefix}/")}

    _load_optimizer_tensors(trainer, part("optimizer"))
    trainer.statistics.load_tensors(part("statistics"))
    trainer.means.load_tensors(part("means"), trainer.device)
    trainer.monitor.load_tensors(part("monitor"))
    _load_random_tensors(part("random"))


def _optimizer_tensors(trainer: Trainer) -> dict[str, Tensor]:
    state = trainer.optimizer.state
    return {
        f"{name}/{key}": value
        for name, parameter in trainer.model.named_parameters()
        for key, value in state.get(parameter, {}).items()
    }


def _load_optimizer_tensors(trainer: Trainer, tensors: Mapping[str, Tensor]) -> None:
    """Put the moments in place. Assigned, not through `load_state_dict`, which knows parameters by number only."""
    parameters = dict(trainer.model.named_parameters())
    trainer.optimizer.state.clear()
    for name, value in tensors.items():
        owner, _, key = name.rpartition("/")
        parameter = parameters[owner]
        if value.ndim and value.shape != parameter.shape:  # the step count has no dimensions
            raise ValueError(f"optimizer/{name} is {tuple(value.shape)}, its parameter {tuple(parameter.shape)}")
        trainer.optimizer.state[parameter][key] = value.to(parameter.device)


def _random_tensors() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _load_random_tensors(tensors: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(tensors["cpu"])
    if torch.cuda.is_available():
        for name in tensors.keys() - {"cpu"}:
            if torch.device(name).index < torch.cuda.device_count():
                torch.cuda.set_rng_state(tensors[name], name)
