"""One optimizer step, in the order it happens: micro-batches, clipping, update, balancers, average.

The rows of a step are those of `Batches`, the same however many micro-batches they are cut into. The loss is the mean
cross-entropy of the tokens, in fp32; to it comes every auxiliary term, summed over the layers. Micro-batches are of one
size and hold no padding, so each weighs 1/accumulate.
"""

import math
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import himoe.nn as moe
from himoe.errors import HimoeError
from himoe.train.alarms import Alarm, diverged
from himoe.train.batches import Batch
from himoe.train.ema import WeightAverage
from himoe.train.means import Means
from himoe.train.monitor import Monitor
from himoe.train.randomness import rank, seed_noise
from himoe.train.schedule import LearningRate
from himoe.train.statistics import Statistics
from himoe.types import Routing


class StepBatches(Protocol):
    """Where rows come from, such as `himoe.train.batches.Batches`."""

    batch_size: int
    accumulate: int
    wait_seconds: float

    def micro_batch(self, step: int, index: int) -> Batch:
        """Return the rows of micro-batch `index` of the step after `step` finished ones."""
        ...


class DivergedError(HimoeError):
    """A loss or gradient that is not finite; `alarm` says where it began."""

    def __init__(self, alarm: Alarm) -> None:
        super().__init__(alarm.text)
        self.alarm = alarm


class Trainer:
    """Trains a model one optimizer step at a time.

    Args:
        model: `(token_ids (B, S), targets=(B, S)) → (mean cross-entropy, routings)`; where rows hold borders of
            documents, it is also given `document_ids (B, S)`.
        batches: the rows of each step and micro-batch.
        optimizer: over the model's parameters.
        learning_rate: step (from 1) → rate.
        statistics: of the model's MoE layers.
        grad_clip: largest norm of the gradient, over all parameters together.
        precision: "fp32", or "bf16" for bf16 autocast of the forward pass.
        ema_decay: of an average of the weights, per step; None for none.
        seed: of dropout and noise (`randomness`).
    """

    def __init__(
        self,
        model: nn.Module,
        batches: StepBatches,
        *,
        optimizer: torch.optim.Optimizer,
        learning_rate: LearningRate,
        statistics: Statistics,
        grad_clip: float = 1.0,
        precision: str = "fp32",
        ema_decay: float | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.batches, self.optimizer, self.learning_rate = model, batches, optimizer, learning_rate
        self.statistics, self.means = statistics, Means()
        self.monitor = Monitor(
            model, statistics.layer_indices, batch_size=batches.batch_size, accumulate=batches.accumulate
        )
        self.ema = None if ema_decay is None else WeightAverage(model, ema_decay)
        self.grad_clip, self.precision, self.seed = grad_clip, precision, seed
        self.device = next(model.parameters()).device
        self.steps_done = 0
        self.tokens_done = 0
        self.step_seconds = 0.0
        """Time spent in steps: no evaluation, no checkpoints."""

    @property
    def data_seconds(self) -> float:
        """Time that steps of this process have waited for data; a part of `step_seconds`."""
        return self.batches.wait_seconds

    def step(self, *, measure: bool = False) -> None:
        """Do one optimizer step; with `measure`, also what is logged but not needed for training (`monitor`).

        Raises DivergedError when the loss or the gradient is not finite; the weights stay those of the step before. The
        trainer has then seen half a step, in gradients and sums: go on from a checkpoint.
        """
        started, number = perf_counter(), self.steps_done + 1
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(number)
        values = self._micro_batch(0)
        if measure:
            self.monitor.after_first_micro_batch()
        for index in range(1, self.batches.accumulate):
            values = {name: values[name] + share for name, share in self._micro_batch(index).items()}
        if measure:
            self.monitor.before_clipping()
        norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self._check_finite(number, values["loss"], norm)
        clip_grads_with_norm_(self.model.parameters(), self.grad_clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        moe.step(self.model)
        if self.ema:
            self.ema.update()
        self.statistics.end_step()
        self.means.add({**values, "grad_norm": norm})
        self.steps_done = number
        self.step_seconds += perf_counter() - started

    def _micro_batch(self, index: int) -> dict[str, Tensor]:
        """Forward, backward and observe one micro-batch; return its share of the step's means."""
        batch, accumulate = self.batches.micro_batch(self.steps_done, index), self.batches.accumulate
        targets = torch.from_numpy(batch.tokens[:, 1:]).to(self.device, torch.int64)
        loss, routings = self._forward(batch, index, targets=targets)
        terms = moe.aux_losses(self.model, routings)
        total = torch.stack([loss, *terms.values()]).sum()
        (total / accumulate).backward()
        moe.observe(self.model, routings)
        self.statistics.observe(routings)
        self.tokens_done += targets.numel()
        means = {"loss": loss, **{f"aux/{name}": term for name, term in terms.items()}}
        return {name: value.detach() / accumulate for name, value in means.items()}

    def _forward(self, batch: Batch, index: int, **given: Tensor) -> tuple[Tensor, list[Routing]]:
        seed_noise(self.seed, self.steps_done, index, rank())
        inputs = torch.from_numpy(batch.tokens[:, :-1]).to(self.device, torch.int64)
        if batch.document_ids is not None:
            given["document_ids"] = torch.from_numpy(batch.document_ids).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model(inputs, **given)

    def _check_finite(self, number: int, loss: Tensor, norm: Tensor) -> None:
        loss_value, norm_value = torch.stack([loss.double(), norm.double()]).tolist()  # the step's one host sync
        if math.isfinite(loss_value) and math.isfinite(norm_value):
            return

        def repeat() -> None:
            for index in range(self.batches.accumulate):
                self._forward(self.batches.micro_batch(self.steps_done, index), index)

        raise DivergedError(diverged(self.model, number, loss=loss_value, grad_norm=norm_value, forward=repeat))
