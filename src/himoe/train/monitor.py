"""What a trainer measures beside the loss, as one part: norms per role, the gradient noise scale, and the alarms.

A trainer calls `after_first_micro_batch` and `before_clipping` in the steps that end a log interval, and in no others;
the journal reads the results.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from himoe.train.alarms import Alarms
from himoe.train.noise import NoiseScale
from himoe.train.norms import RoleNorms


class Monitor:
    """Bundles what is measured, so that it is wired and saved once.

    Args:
        model: the model in training.
        layer_indices: where its MoE layers stand.
        batch_size: sequences of a step.
        accumulate: micro-batches of a step.
    """

    def __init__(self, model: nn.Module, layer_indices: Sequence[int], *, batch_size: int, accumulate: int) -> None:
        self.norms = RoleNorms(model)
        self.noise = NoiseScale(model.parameters(), batch_size=batch_size, accumulate=accumulate)
        self.alarms = Alarms(model, layer_indices)

    def after_first_micro_batch(self) -> None:
        """Measure what the first backward left, before the second adds to it."""
        self.noise.first_micro_batch()

    def before_clipping(self) -> None:
        """Measure the step's whole gradient."""
        self.norms.measure()
        self.noise.whole_step(self.norms.gradient)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state, for a checkpoint taken between two steps."""
        parts = {"noise": self.noise.tensors(), "alarms": self.alarms.tensors()}
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned."""
        for part, target in (("noise", self.noise), ("alarms", self.alarms)):
            target.load_tensors({n.removeprefix(f"{part}/"): t for n, t in tensors.items() if n.startswith(f"{part}/")})
