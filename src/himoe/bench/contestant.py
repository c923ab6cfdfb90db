"""What is compared: something that computes a problem's output, with leaves that receive the gradients."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from himoe.bench.problem import Problem


class CannotRunError(Exception):
    """A contestant that does not take a problem; the message says why."""


@dataclass
class Contestant:
    """One implementation, ready to run.

    Attributes:
        problem: what it solves.
        forward: → y (T, D).
        leaves: a tensor, or one for every expert, for each name of `Problem.leaves`; in the problem's layout.
        normalizes: it divides the weights by their sum, which is 1, once more; the gradient is then the quotient's.
    """

    problem: Problem
    forward: Callable[[], Tensor]
    leaves: Mapping[str, Tensor | Sequence[Tensor]] = field(default_factory=dict)
    normalizes: bool = False

    def __post_init__(self) -> None:
        self.leaves = {**self.problem.leaves, **self.leaves}

    def step(self) -> Tensor:
        """Run forward and backward; return the output."""
        y = self.forward()
        y.backward(self.problem.grad)
        return y

    def clear(self) -> None:
        """Drop all gradients."""
        for tensor in self._tensors():
            tensor.grad = None

    def results(self) -> dict[str, Tensor]:
        """Run once and return `y` and all gradients as `problem.answer` has them."""
        self.clear()
        found = {"y": self.step().detach()}
        for name, leaf in self.leaves.items():
            grad = leaf.grad if isinstance(leaf, Tensor) else _stacked(leaf)
            if grad is not None:
                found[name] = grad
        return found

    def given(self) -> list[Tensor]:
        """Return inputs and weights: what is there whether or not a step is made."""
        problem = self.problem
        return [*self._tensors(), *problem.leaves.values(), problem.expert_ids, problem.kept, problem.grad]

    def _tensors(self) -> list[Tensor]:
        return [t for leaf in self.leaves.values() for t in ([leaf] if isinstance(leaf, Tensor) else leaf)]


def _stacked(leaf: Sequence[Tensor]) -> Tensor:
    """Return the gradients of every expert; one that got no token may have none."""
    return torch.stack([torch.zeros_like(t) if t.grad is None else t.grad for t in leaf])


def leaf(tensor: Tensor) -> Tensor:
    """Return a leaf of its own on the same memory."""
    return tensor.detach().requires_grad_()
