"""Balance of every MoE layer while training: O(E) memory a layer, on the device, read out only when a line is due.

Aggregation levels (a metric's level is part of its name): `batch` is one optimizer step with all its micro-batches,
`window` the sum of the last 50 steps, and an interval is the steps since the last read-out. MaxVio and CV are of the
pairs as selected, so that a capacity limit cannot hide an imbalance; `load` is of the pairs it kept. Without drops both
are the same. Σ_g m_g² and C_g are means over tokens of softmax(raw logits), whatever the router does with them later.
Experts per token are a mean too: some selectors give every token as many as it needs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from himoe.functional import losses, stats
from himoe.functional.groups import Groups
from himoe.nn import Router
from himoe.types import Routing

WINDOW = 50


class Statistics:
    """Accumulates loads, violations and group statistics of L layers.

    Args:
        layer_indices: where the MoE layers stand in the model, in the order of the routings.
        groups: the groups to measure by, the same in every layer, whether or not the router chooses by group.
        routers: of the layers, to measure what their selectors' `max_k` cuts off; without them nothing is.
        window: steps in the window.
        device: where routings live.
    """

    def __init__(
        self,
        layer_indices: Sequence[int],
        groups: Groups,
        *,
        routers: Sequence[Router] = (),
        window: int = WINDOW,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layer_indices, self.groups, self.routers = list(layer_indices), groups, list(routers)
        layers, experts = len(self.layer_indices), groups.num_experts
        pairs = torch.zeros(layers, experts, dtype=torch.int64, device=device)
        sums = torch.zeros(layers, dtype=torch.float64, device=device)
        self._step_load = pairs
        self._window = torch.zeros(window, *pairs.shape, dtype=torch.int64, device=device)
        self._interval = {
            "kept": pairs.clone(),
            "selected": pairs.clone(),
            "tokens": torch.zeros(layers, dtype=torch.int64, device=device),
            "max_vio": sums.clone(),  # Σ over steps
            "group_mass": sums.clone(),  # Σ over micro-batches of the mean Σ_g m_g²
            "concentration": sums.clone(),  # Σ over micro-batches of the mean C_g
            "truncated": sums.clone(),  # Σ over micro-batches of the mean truncated mass
        }
        self._steps = self._interval_steps = self._interval_micro_batches = 0

    @torch.no_grad()
    def observe(self, routings: Sequence[Routing]) -> None:
        """Add one micro-batch."""
        assert len(routings) == len(self.layer_indices), "one routing per MoE layer"
        if not routings:
            return
        selected = torch.stack([stats.selected_load(routing) for routing in routings])
        dropless = all(routing.kept is routing.selected for routing in routings)
        self._step_load += selected
        self._interval["kept"] += selected if dropless else torch.stack([stats.load(routing) for routing in routings])
        mass, concentration = zip(*(losses.group_measures(routing, self.groups) for routing in routings), strict=True)
        self._interval["group_mass"] += torch.stack(mass)
        self._interval["concentration"] += torch.stack(concentration)
        for layer, routing in enumerate(routings):
            mask = routing.context.mask
            self._interval["tokens"][layer] += routing.logits.shape[0] if mask is None else mask.sum()
        for layer, router in enumerate(self.routers):
            if (wanted := router.wanted(routings[layer])) is not None:
                self._interval["truncated"][layer] += stats.truncated_mass(routings[layer], wanted)
        self._interval_micro_batches += 1

    @torch.no_grad()
    def end_step(self) -> None:
        """Close an optimizer step: its load enters the window and the interval."""
        self._window[self._steps % len(self._window)] = self._step_load
        self._interval["selected"] += self._step_load
        self._interval["max_vio"] += stats.max_vio(self._step_load)
        self._step_load.zero_()
        self._steps += 1
        self._interval_steps += 1

    def read(self) -> list[dict[str, Any]]:
        """Return one record per layer as load.jsonl stores it: the interval's loads and means, the window's metrics."""
        if not self.layer_indices:
            return []
        sums, window = self._interval, self._window.sum(0)
        steps, micro_batches = max(1, self._interval_steps), max(1, self._interval_micro_batches)
        kept, selected = (sums[name].sum(-1).double() for name in ("kept", "selected"))
        columns = {
            "experts_per_token": selected / sums["tokens"].clamp(min=1),
            "truncated_mass": sums["truncated"] / micro_batches,
            "drop_rate": (selected - kept) / selected.clamp(min=1),
            "max_vio_batch": sums["max_vio"] / steps,
            "max_vio_window": stats.max_vio(window),
            "cv_window": stats.coefficient_of_variation(window),
            "effective_experts": stats.effective_experts(window),
            "group_mass": sums["group_mass"] / micro_batches,
            "concentration": sums["concentration"] / micro_batches,
        }
        lists = torch.stack([sums["kept"], stats.is_dead(window)]).tolist()  # this and the next wait for the device
        rows = torch.stack(list(columns.values()), dim=-1).tolist()
        return [
            {
                "layer": layer,
                "load": load,
                **dict(zip(columns, row, strict=True)),
                "dead_experts": [expert for expert, is_dead in enumerate(dead) if is_dead],
            }
            for layer, load, dead, row in zip(self.layer_indices, *lists, rows, strict=True)
        ]

    def start_interval(self) -> None:
        """Begin the next interval; the window goes on."""
        for total in self._interval.values():
            total.zero_()
        self._interval_steps = self._interval_micro_batches = 0

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole state, for a checkpoint taken between two steps."""
        return {
            "window": self._window,
            **self._interval,
            "steps": torch.tensor(self._steps),
            "interval_steps": torch.tensor(self._interval_steps),
            "interval_micro_batches": torch.tensor(self._interval_micro_batches),
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned."""
        for name, mine in {"window": self._window, **self._interval}.items():
            mine.copy_(tensors[name])
        self._steps = int(tensors["steps"])
        self._interval_steps = int(tensors["interval_steps"])
        self._interval_micro_batches = int(tensors["interval_micro_batches"])
