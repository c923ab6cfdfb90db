"""Means of named scalars over an interval of steps, kept on the device until somebody reads them."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Means:
    """Sums in fp64 beside the number of steps; `read` is the only point that waits for the device.

    >>> means = Means()
    >>> means.add({"loss": torch.tensor(3.0)}), means.add({"loss": torch.tensor(5.0)})
    (None, None)
    >>> means.read()
    {'loss': 4.0}
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one step's values, the same names every time."""
        for name, value in values.items():
            wide = value.detach().double()
            self._sums[name] = self._sums[name] + wide if name in self._sums else wide
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Return the mean of each name; empty when no step was added."""
        return {name: float(total) / self._steps for name, total in self._sums.items()}

    def reset(self) -> None:
        """Begin the next interval."""
        self._sums, self._steps = {}, 0

    def tensors(self) -> dict[str, Tensor]:
        """Return the state, for a checkpoint."""
        return {"steps": torch.tensor(self._steps), **{f"sums/{name}": total for name, total in self._sums.items()}}

    def load_tensors(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Restore what `tensors` returned."""
        self._steps = int(tensors["steps"])
        self._sums = {
            name.removeprefix("sums/"): total.to(device) for name, total in tensors.items() if name.startswith("sums/")
        }
