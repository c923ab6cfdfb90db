"""One optimizer step, in the order it happens: micro-batches, clipping, update, balancers.

The rows of step s (counted from 1) are the samples (s − 1)·B … s·B − 1 of the training order, however many
micro-batches they are cut into: sample i is a function of the seed and i alone. The loss is the mean cross-entropy of
the tokens, in fp32; to it comes every auxiliary term, summed over the layers. Micro-batches are of one size, so each
weighs 1/accumulate.
"""

import math
from time import perf_counter
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

import himoe.nn as moe
from himoe.errors import HimoeError
from himoe.train.means import Means
from himoe.train.schedule import LearningRate
from himoe.train.statistics import Statistics


class TrainingSamples(Protocol):
    """The training order: sample i is a function of the seed and i alone."""

    def sample(self, index: int, /) -> np.ndarray:
        """Return seq_len + 1 token ids: a sequence and its next token."""
        ...


class Trainer:
    """Trains a model one optimizer step at a time.

    Args:
        model: `(token_ids (B, S)) → (logits (B, S, V), routings)`.
        samples: the training order.
        optimizer: over the model's parameters.
        learning_rate: step (from 1) → rate.
        statistics: of the model's MoE layers.
        batch_size: sequences per optimizer step.
        accumulate: micro-batches per optimizer step; divides batch_size.
        grad_clip: largest norm of the gradient, over all parameters together.
        precision: "fp32", or "bf16" for bf16 autocast of the forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: TrainingSamples,
        *,
        optimizer: torch.optim.Optimizer,
        learning_rate: LearningRate,
        statistics: Statistics,
        batch_size: int,
        accumulate: int = 1,
        grad_clip: float = 1.0,
        precision: str = "fp32",
    ) -> None:
        assert batch_size % accumulate == 0, f"accumulate = {accumulate} must divide batch_size = {batch_size}"
        self.model, self.samples, self.optimizer, self.learning_rate = model, samples, optimizer, learning_rate
        self.statistics, self.means = statistics, Means()
        self.batch_size, self.accumulate, self.grad_clip, self.precision = batch_size, accumulate, grad_clip, precision
        self.device = next(model.parameters()).device
        self.steps_done = 0
        self.tokens_done = 0
        self.step_seconds = 0.0
        """Time spent in steps: no evaluation, no checkpoints."""

    def step(self) -> None:
        """Do one optimizer step.

        Raises HimoeError when the loss or the gradient is not finite; the weights stay those of the step before.
        """
        started, number = perf_counter(), self.steps_done + 1
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(number)
        values = self._micro_batch(0)
        for index in range(1, self.accumulate):
            values = {name: values[name] + share for name, share in self._micro_batch(index).items()}
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self._check_finite(number, values["loss"], norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        moe.step(self.model)
        self.statistics.end_step()
        self.means.add({**values, "grad_norm": norm})
        self.steps_done = number
        self.step_seconds += perf_counter() - started

    def _micro_batch(self, index: int) -> dict[str, Tensor]:
        """Forward, backward and observe one micro-batch; return its share of the step's means."""
        tokens = self._next_tokens(index)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits, routings = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        terms = moe.aux_losses(self.model, routings)
        total = torch.stack([loss, *terms.values()]).sum()
        (total / self.accumulate).backward()
        moe.observe(self.model, routings)
        self.statistics.observe(routings)
        means = {"loss": loss, **{f"aux/{name}": term for name, term in terms.items()}}
        return {name: value.detach() / self.accumulate for name, value in means.items()}

    def _next_tokens(self, micro_batch: int) -> Int[Tensor, "rows seq_len+1"]:
        rows = self.batch_size // self.accumulate
        first = self.steps_done * self.batch_size + micro_batch * rows
        samples = np.stack([self.samples.sample(index) for index in range(first, first + rows)])
        tokens = torch.from_numpy(samples).to(self.device, torch.int64)
        self.tokens_done += samples.shape[0] * (samples.shape[1] - 1)
        return tokens

    @staticmethod
    def _check_finite(number: int, loss: Tensor, norm: Tensor) -> None:
        loss_value, norm_value = torch.stack([loss.double(), norm.double()]).tolist()  # the step's one host sync
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise HimoeError(
                f"training diverged at step {number}: loss {loss_value:g}, gradient norm {norm_value:g}; "
                "lower train.learning_rate or raise train.warmup_steps"
            )
