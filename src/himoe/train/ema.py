"""Exponential moving average of the weights: often a better model than the last weights, at the cost of one copy.

After step t the average of parameter w, with decay d, is

    Σ_{s=1…t} d^(t−s)·w_s / Σ_{s=1…t} d^(t−s)

the w_s being the weights after each step: the usual average without the share of the initial weights, which for a short
run would be most of it. It is kept in fp32, whatever the dtype of the model, and updated once per optimizer step.
Buffers, which hold balancer state and counts, are not averaged: the averaged model has those of the last step.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """The average of a model's parameters, each tied weight once.

    Args:
        model: whose parameters are averaged.
        decay: d, of one step, 0 < d < 1.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> average = WeightAverage(model, decay=0.5)
    >>> for value in (1.0, 4.0):
    ...     _ = nn.init.constant_(model.weight, value)
    ...     average.update()
    >>> with average.in_place():  # (0.5·1 + 4) / 1.5
    ...     model.weight.item()
    3.0
    >>> model.weight.item()
    4.0
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        assert 0 < decay < 1, decay
        self.decay, self.updates = decay, 0
        self._parameters = dict(model.named_parameters())
        self._averages = {name: tensor.detach().float().clone() for name, tensor in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now, after an optimizer step."""
        self.updates += 1
        newest = (1 - self.decay) / (1 - self.decay**self.updates)  # of the first one: all of it
        weights = [parameter.detach().float() for parameter in self._parameters.values()]
        get_ema_multi_avg_fn(1 - newest)(list(self._averages.values()), weights, None)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average into the model for a while; then, also after an error, the very weights that were there."""
        weights = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        try:
            self._put(self._averages)
            yield
        finally:
            self._put(weights)

    @torch.no_grad()
    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[name])

    def tensors(self) -> dict[str, Tensor]:
        """Return the averages by parameter name, for a checkpoint."""
        return dict(self._averages)

    def load_tensors(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Restore what `tensors` returned, after as many updates. Raises ValueError for other names or shapes."""
        given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        expected = {name: tuple(tensor.shape) for name, tensor in self._averages.items()}
        if given != expected:
            wrong = sorted(name for name in given | expected if given.get(name) != expected.get(name))
            raise ValueError(f"the average of {wrong[0]} is {given.get(wrong[0])}, must be {expected.get(wrong[0])}")
        for name, average in self._averages.items():
            average.copy_(tensors[name])
        self.updates = updates
