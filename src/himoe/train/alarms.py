"""Alarms: faults of training that the numbers of a log line show, each with what to do about it.

They look at values that are on the host anyway when a line is written, and at selection biases that have a rate. An
alarm goes off when its fault appears, and again only after the fault was gone and `QUIET_STEPS` have passed: a fault
that comes back earlier and stays is raised once they have. What they remember goes into every checkpoint, so a resumed
run raises the alarms of an undisturbed one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from himoe.balance import Balancer
from himoe.functional import scores
from himoe.functional.selection import top_k_per_group
from himoe.nn import MoE, moe_layers
from himoe.train.nonfinite import NonFiniteLossError, find_nonfinite
from himoe.train.statistics import WINDOW

QUIET_STEPS = 200
"""Least steps between two alarms of one kind in one layer."""
SPIKE_HISTORY = 20
"""Lines whose losses say what is normal, half of them at least: before that a loss has no normal."""
SPIKE_DEVIATIONS = 6.0
"""A loss this many robust deviations above the median is no noise: of normal noise one line in 10⁹ lies there."""
SPIKE_RISE = 0.1
"""… and this share above it: a loss that hardly moves has hardly any deviation."""
FIRST_STEPS = 20
"""Routers are not judged before: their first choices come from random weights."""
SPARE_USED = 0.25
"""Collapse: of the E − K experts that one token leaves free, all tokens together use less than this share."""
GROUP_MASS = 0.95
"""Mean Σ m² at which one group holds 97 % of a token's probability, and the experts of the others weigh nothing."""
BIAS_RANGE = 1.0
"""Softmax and sigmoid scores lie between 0 and 1: biases further apart than that choose experts by themselves."""
BIAS_RATIO = 1000.0
"""The same for a multiplicative bias, largest over smallest."""
WAITING = 0.1
"""Share of the step time spent waiting for data that is worth an alarm; 1 % is what training is built for."""
WAITING_SECONDS = 2.0
"""… if it adds up to this in one line: steps of a few milliseconds wait for anything."""


@dataclass(frozen=True)
class Alarm:
    """A fault: what it is called, after which step it was seen, where, and a line with the numbers and what to do."""

    kind: str
    step: int
    layer: int | None
    text: str

    @property
    def stops(self) -> bool:
        """Whether `train.stop_on_alarm` ends the run for it: waiting for data spoils no result."""
        return self.kind != "slow_data"

    def line(self) -> dict[str, Any]:
        """Return the alarm as `metrics.jsonl` stores it."""
        return {"alarm": self.kind, "layer": self.layer, "text": self.text}


def diverged(
    model: nn.Module, step: int, *, loss: float, grad_norm: float, forward: Callable[[], object] | None = None
) -> Alarm:
    """Return the alarm for a loss or gradient norm that is NaN or infinite, with the first place where that is so.

    `forward` repeats the forward pass of the step, so that the search can look at every module's output.
    """
    place = find_nonfinite(model, forward)
    found = f"; first not finite: {place}" if place else ""
    return Alarm(
        "not_finite",
        step,
        place.layer if place else None,
        f"training diverged at step {step}: loss {loss:g}, gradient norm {grad_norm:g}{found}; "
        "lower train.learning_rate or raise train.warmup_steps",
    )


def diverged_in_evaluation(step: int, error: NonFiniteLossError) -> Alarm:
    """Return the alarm for an evaluation whose loss is NaN or infinite."""
    place = error.place
    return Alarm("not_finite", step, place.layer if place else None, f"training diverged by step {step}: {error}")


class Alarms:
    """Judges every log line of one run.

    Args:
        model: whose MoE layers, in the order of `moe_layers`, are judged.
        layer_indices: where those layers stand in the model.
    """

    def __init__(self, model: nn.Module, layer_indices: Sequence[int]) -> None:
        self._layers = dict(zip(layer_indices, moe_layers(model), strict=True))
        self._biases = [(index, part) for index, layer in self._layers.items() for part in _bounded_biases(layer)]
        self._losses: list[float] = []
        self._active: set[tuple[str, int | None]] = set()
        self._raised: dict[tuple[str, int | None], int] = {}

    def check(
        self, line: Mapping[str, Any], layers: Sequence[Mapping[str, Any]], *, waited: float = 0.0
    ) -> list[Alarm]:
        """Return the alarms that go off at a training line.

        Args:
            line: as `metrics.jsonl` stores it.
            layers: what `Statistics.read` returned at the same step.
            waited: seconds of the line's steps that were waiting for data.
        """
        step: int = line["step"]
        found = [*self._loss(line), *_waiting(line, waited), *self._bias(step)]
        for record in layers if step >= FIRST_STEPS else ():
            found += [*_routing(step, record, self._layers[record["layer"]]), *_dead(step, record)]
        now = {(alarm.kind, alarm.layer): alarm for alarm in found}
        new = {key: alarm for key, alarm in now.items() if key not in self._active and self._is_quiet(key, step)}
        self._active = {key for key in now if key in self._active or key in new}  # not those held back: they may stay
        self._raised |= {key: step for key in new}  # noqa: C420 - fromkeys loses the type
        return list(new.values())

    def _is_quiet(self, key: tuple[str, int | None], step: int) -> bool:
        return key not in self._raised or step - self._raised[key] >= QUIET_STEPS

    def _loss(self, line: Mapping[str, Any]) -> Iterator[Alarm]:
        """Judge the loss by those before, then add it to them."""
        loss, before = line["loss"], self._losses
        self._losses = [*before, loss][-SPIKE_HISTORY:]
        if len(before) < SPIKE_HISTORY // 2:
            return
        normal = median(before)
        deviation = 1.4826 * median(abs(value - normal) for value in before)  # equals σ for normal noise
        if loss - normal > max(SPIKE_DEVIATIONS * deviation, SPIKE_RISE * abs(normal)):
            yield Alarm(
                "loss_spike",
                line["step"],
                None,
                f"loss {loss:.3f} at step {line['step']}, median of the {len(before)} lines before {normal:.3f} "
                f"(deviation {deviation:.3f}), learning rate {line['lr']:.3g}: if it does not come back, lower "
                "train.learning_rate or train.grad_clip, or raise train.warmup_steps",
            )

    def _bias(self, step: int) -> Iterator[Alarm]:
        if not self._biases:
            return
        ends = (
            torch.stack([part.get_buffer("bias").aminmax()[i] for _, part in self._biases for i in (0, 1)])
            .view(-1, 2)
            .tolist()
        )
        for (layer, part), (low, high) in zip(self._biases, ends, strict=True):
            if part.bias_multiplies and high > BIAS_RATIO * low:
                size, limit = f"{high / low:.3g} times apart", f"{BIAS_RATIO:g} times"
            elif not part.bias_multiplies and high - low > BIAS_RANGE:
                size, limit = f"{high - low:.3g} apart", f"scores lie within {BIAS_RANGE:g}"
            else:
                continue
            yield Alarm(
                "growing_bias",
                step,
                layer,
                f"layer {layer}: the biases of {type(part).__name__} are {size} at step {step} ({limit}), so they "
                f"choose experts whatever the token says: lower its rate = {part.bias_step:g}, or end its moves by a "
                "schedule",
            )

    def tensors(self) -> dict[str, Tensor]:
        """Return what is remembered, for a checkpoint."""
        state = {"losses": torch.tensor(self._losses, dtype=torch.float64)}
        state |= {f"raised/{_name(key)}": torch.tensor(step) for key, step in self._raised.items()}
        return state | {f"active/{_name(key)}": torch.tensor(True) for key in self._active}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned."""
        self._losses = tensors["losses"].tolist()
        parts = {name: name.partition("/")[::2] for name in tensors.keys() - {"losses"}}
        self._raised = {_key(key): int(tensors[name]) for name, (part, key) in parts.items() if part == "raised"}
        self._active = {_key(key) for part, key in parts.values() if part == "active"}


def _name(key: tuple[str, int | None]) -> str:
    return f"{key[0]}/{'' if key[1] is None else key[1]}"


def _key(name: str) -> tuple[str, int | None]:
    kind, _, layer = name.partition("/")
    return kind, int(layer) if layer else None


def _bounded_biases(layer: MoE) -> list[Balancer]:
    """Return the layer's balancers whose bias moves at a rate, where its scores are known to lie between 0 and 1."""
    if layer.router.score not in (scores.softmax, scores.sigmoid):
        return []
    parts = [part for part in layer.router.balancer.modules() if isinstance(part, Balancer)]
    return [part for part in parts if part.bias_step is not None and isinstance(getattr(part, "bias", None), Tensor)]


def _num_groups(layer: MoE) -> int:
    """Return how many groups the router must choose from, 1 where it chooses freely."""
    selector = layer.router.selector
    if isinstance(selector, partial) and selector.func is top_k_per_group:
        return selector.keywords["groups"].num_groups
    return 1


def _routing(step: int, record: Mapping[str, Any], layer: MoE) -> Iterator[Alarm]:
    """Judge how many experts, and how many groups, the layer uses."""
    index, total, chosen = record["layer"], layer.router.num_experts, record["experts_per_token"]
    used = record["effective_experts"]
    if chosen < total and used - chosen < SPARE_USED * (total - chosen):  # with all of them chosen nothing can collapse
        yield Alarm(
            "router_collapse",
            step,
            index,
            f"layer {index}: the tokens of the last {WINDOW} steps went to {used:.1f} of {total} experts (effective "
            f"number; {chosen:.3g} is the least), MaxVio {record['max_vio_window']:.2f}, at step {step}: raise the "
            "weight of the load-balancing loss (himoe list presets NAME), add a balancer such as loss_free, or lower "
            "train.learning_rate",
        )
    if (groups := _num_groups(layer)) > 1 and record["group_mass"] > GROUP_MASS:
        yield Alarm(
            "group_collapse",
            step,
            index,
            f"layer {index}: Σ m² = {record['group_mass']:.3f} at step {step}, so one of {groups} groups "
            "holds nearly all of a token's probability and the experts of the others count for nothing: raise the "
            "weight of the term between groups (lambda_inter), or use intra = group_conditional",
        )


def _dead(step: int, record: Mapping[str, Any]) -> Iterator[Alarm]:
    dead, index = record["dead_experts"], record["layer"]
    if dead and step >= WINDOW:
        names = ", ".join(map(str, dead[:8])) + (f" and {len(dead) - 8} more" if len(dead) > 8 else "")
        yield Alarm(
            "dead_experts",
            step,
            index,
            f"layer {index}: expert{'s' if len(dead) > 1 else ''} {names} of {len(record['load'])} had under 1 % of a "
            f"fair share of the last {WINDOW} steps, at step {step}: raise the weight of the load-balancing loss, add "
            "loss_free or raise its rate",
        )


def _waiting(line: Mapping[str, Any], waited: float) -> Iterator[Alarm]:
    if line["data_wait"] > WAITING and waited > WAITING_SECONDS:
        yield Alarm(
            "slow_data",
            line["step"],
            None,
            f"{line['data_wait']:.0%} of the step time until step {line['step']} was waiting for data: keep the "
            "prepared data on a local disk (himoe prepare --out), or leave other programs more of the machine",
        )
