"""Balance of every MoE layer while training: O(E) memory a layer, on the device, read out only when a line is due.

Aggregation levels (a metric's level is part of its name): `batch` is one optimizer step with all its micro-batches,
`window` the sum of the last 50 steps, and an interval is the steps since the last read-out. Loads are kept pairs.
Σ_g m_g² and C_g are means over tokens of softmax(raw logits), whatever the router does with them later.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from himoe.functional import losses, stats
from himoe.functional.groups import Groups
from himoe.types import Routing

WINDOW = 50


class Statistics:
    """Accumulates loads, violations and group statistics of L layers.

    Args:
        layer_indices: where the MoE layers stand in the model, in the order of the routings.
        groups: the experts' groups, the same in every layer; one group for a router without groups.
        window: steps in the window.
        device: where routings live.
    """

    def __init__(
        self,
        layer_indices: Sequence[int],
        groups: Groups,
        *,
        window: int = WINDOW,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layer_indices, self.groups = list(layer_indices), groups
        num_layers, num_experts = len(self.layer_indices), groups.num_experts
        self._window = torch.zeros(window, num_layers, num_experts, dtype=torch.int64, device=device)
        self._step_load = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        self._interval_load = torch.zeros_like(self._step_load)
        # Rows: Σ over steps of batch MaxVio, Σ over micro-batches of Σ_g m_g², Σ over micro-batches of mean C_g.
        self._sums = torch.zeros(3, num_layers, dtype=torch.float64, device=device)
        self._counts = torch.zeros(3, dtype=torch.int64)  # steps ever, steps and micro-batches of the interval

    @torch.no_grad()
    def observe(self, routings: Sequence[Routing]) -> None:
        """Add one micro-batch."""
        assert len(routings) == len(self.layer_indices), "one routing per MoE layer"
        if not routings:
            return
        self._step_load += torch.stack([stats.load(routing) for routing in routings])
        for layer, routing in enumerate(routings):
            log_p = losses.log_probabilities(routing, "raw")
            self._sums[1, layer] += losses.inter_dense(log_p, routing, self.groups)
            self._sums[2, layer] += losses.intra_group_conditional(log_p, routing, self.groups)
        self._counts[2] += 1

    @torch.no_grad()
    def end_step(self) -> None:
        """Close an optimizer step: its load enters the window and the interval."""
        self._window[int(self._counts[0]) % len(self._window)] = self._step_load
        self._interval_load += self._step_load
        self._sums[0] += stats.max_vio(self._step_load)
        self._step_load.zero_()
        self._counts[:2] += 1

    def window_max_vio(self) -> float | None:
        """Return the largest MaxVio of any layer over the window; None for a model without MoE layers."""
        return float(stats.max_vio(self._window.sum(0)).max()) if self.layer_indices else None

    def read(self) -> list[dict[str, Any]]:
        """Return one record per layer as load.jsonl stores it: the interval's loads and means, the window's metrics."""
        if not self.layer_indices:
            return []
        _, steps, micro_batches = self._counts.clamp(min=1).tolist()
        divisors = self._sums.new_tensor([steps, micro_batches, micro_batches])
        violation, mass, concentration = (self._sums / divisors[:, None]).tolist()
        window = self._window.sum(0)
        window_violation, window_variation = stats.max_vio(window), stats.coefficient_of_variation(window)
        load = self._interval_load.tolist()
        return [
            {
                "layer": index,
                "load": load[layer],
                "max_vio_batch": violation[layer],
                "max_vio_window": float(window_violation[layer]),
                "cv_window": float(window_variation[layer]),
                "group_mass": mass[layer],
                "concentration": concentration[layer],
            }
            for layer, index in enumerate(self.layer_indices)
        ]

    def start_interval(self) -> None:
        """Begin the next interval; the window goes on."""
        self._interval_load.zero_()
        self._sums.zero_()
        self._counts[1:] = 0

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole state, for a checkpoint taken between two steps."""
        return {
            "window": self._window,
            "interval_load": self._interval_load,
            "sums": self._sums,
            "counts": self._counts,
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned."""
        for name, mine in self.tensors().items():
            mine.copy_(tensors[name])
