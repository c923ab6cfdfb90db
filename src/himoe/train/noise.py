"""The gradient noise scale (McCandlish et al., arXiv 1812.06162, appendix A.1): how large a batch is worth its price.

With the squared norms of the gradient over B_small and over B_big sequences, unbiased estimates of the true gradient's
squared norm and of the trace of one sequence's gradient covariance are

    |G|² = (B_big·|G_big|² − B_small·|G_small|²) / (B_big − B_small)
    S    = (|G_small|² − |G_big|²) / (1/B_small − 1/B_big)

and the noise scale is S/|G|². Each estimate is noisy and can be negative, and a ratio of them would be biased, so the
two are averaged over measurements first, each by itself. A batch much smaller than the noise scale gains almost in
proportion when it grows, a much larger one gains little.

B_small is one micro-batch, B_big the whole step: with one micro-batch a step there is nothing to compare. The unit is
sequences, what a step draws independently; the tokens of a sequence are not independent of one another. Measured is the
gradient that training follows, auxiliary losses included, before clipping. Auxiliary losses that are not linear in the
counts of their micro-batch make it approximate.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

DECAY = 0.95  # the last 20 measurements count most: one alone is off by a multiple of its value
LEAST_MEASUREMENTS = 10


class NoiseScale:
    """Running means of |G|² and S, updated in the steps that are measured.

    Args:
        parameters: of the model.
        batch_size: sequences of a step.
        accumulate: micro-batches of a step; with 1 nothing is measured.
        decay: of the running means, per measurement.

    ```python
    first.backward()
    noise.first_micro_batch()
    rest.backward()
    noise.whole_step(get_total_norm(p.grad for p in parameters))  # before clipping
    ```
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, batch_size: int, accumulate: int, decay: float = DECAY
    ) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._big, self._small, self._accumulate = batch_size, batch_size / accumulate, accumulate
        self._decay = decay
        self._means = torch.zeros(2, dtype=torch.float64, device=self._parameters[0].device)  # |G|², S
        self._measurements = 0
        self._first: Tensor | None = None

    @torch.no_grad()
    def first_micro_batch(self) -> None:
        """Take the norm after the first backward of a step, which was of loss / accumulate."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if self._accumulate > 1 and gradients:
            self._first = (get_total_norm(gradients).double() * self._accumulate).square()

    @torch.no_grad()
    def whole_step(self, norm: Tensor) -> None:
        """Add a measurement, given the norm of the whole step's gradient."""
        if self._first is None:
            return
        big, small, square = self._big, self._small, norm.double().square()
        gradient = (big * square - small * self._first) / (big - small)
        noise = (self._first - square) / (1 / small - 1 / big)
        self._measurements += 1
        weight = max(1 / self._measurements, 1 - self._decay)  # a plain mean until there are enough
        self._means.lerp_(torch.stack([gradient, noise]).to(self._means.device), weight)
        self._first = None

    def read(self) -> float | None:
        """Return the noise scale in sequences; None before 10 measurements, or while |G|² is lost in the noise.

        Also None where this run no longer measures: one resumed with one micro-batch a step.
        """
        if self._accumulate == 1 or self._measurements < LEAST_MEASUREMENTS:
            return None
        gradient, noise = self._means.tolist()
        return max(noise, 0.0) / gradient if gradient > 0 else None

    def tensors(self) -> dict[str, Tensor]:
        """Return the state, for a checkpoint taken between two steps."""
        return {"means": self._means, "measurements": torch.tensor(self._measurements)}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned."""
        self._means.copy_(tensors["means"])
        self._measurements = int(tensors["measurements"])
