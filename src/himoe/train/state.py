"""What a trainer must remember beside its model's tensors, as one flat dictionary of tensors.

`optimizer/<parameter>/<name>` the optimizer's state by parameter name · `random/<device>` the states of torch's
generators · `statistics/…` and `means/…` what has been accumulated since the last log line. Learning rates, data
position and epoch are functions of the step and need no place here.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from himoe.train.loop import Trainer


def trainer_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Return the state at a step boundary."""
    parts = {
        "optimizer": _optimizer_tensors(trainer),
        "random": _random_tensors(),
        "statistics": trainer.statistics.tensors(),
        "means": trainer.means.tensors(),
    }
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def load_trainer_tensors(trainer: Trainer, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `trainer_tensors` returned; the parameters are those of the model in `trainer`."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(f"{prefix}/"): t for n, t in tensors.items() if n.startswith(f"{prefix}/")}

    _load_optimizer_tensors(trainer, part("optimizer"))
    trainer.statistics.load_tensors(part("statistics"))
    trainer.means.load_tensors(part("means"), trainer.device)
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
        trainer.optimizer.state[parameters[owner]][key] = value.to(parameters[owner].device)


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
