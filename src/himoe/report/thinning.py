"""Thins long series, so that the page of a run of a million steps still opens.

Every function keeps short series as they are. Means are over the bin's values; a curve also keeps the bin's lowest and
highest value, so that a spike never disappears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

from himoe.report.read import RunFolder, number

MAX_POINTS = 1500
"""Series up to this long are embedded untouched."""
NUM_BINS = 500
"""Points that a longer series is pooled into."""
MAX_LOAD_BINS = 300
"""Columns of a heat map: about the pixels it has."""
MAX_LOAD_CELLS = 400_000
"""Cells of all heat maps together: about 2 MB of the page."""
LAYER_STATISTICS = (
    "experts_per_token",
    "truncated_mass",
    "drop_rate",
    "max_vio_batch",
    "max_vio_window",
    "cv_window",
    "group_mass",
    "concentration",
)


@dataclass
class Series:
    """A curve: x, y and, if it was pooled, the bins' lowest and highest y (else both empty)."""

    x: list[float | None]
    y: list[float | None]
    low: list[float | None] = field(default_factory=list)
    high: list[float | None] = field(default_factory=list)


@dataclass
class LayerHistory:
    """One MoE layer over time: `ratio[bin][expert]` is load / mean load, `statistics[name][bin]` a mean."""

    layer: int
    ratio: list[list[float | None]]
    statistics: dict[str, list[float | None]]


@dataclass
class LoadHistory:
    """All layers over the same bins; bin i covers the steps in (edges[i], edges[i + 1]]."""

    edges: list[float]
    layers: list[LayerHistory]
    lines_per_bin: int

    @property
    def num_experts(self) -> int:
        """Experts of a layer, 0 when nothing was recorded."""
        return len(self.layers[0].ratio[0]) if self.layers else 0

    @property
    def ends(self) -> list[float]:
        """The last step of every bin."""
        return self.edges[1:]


def series(lines: Sequence[dict[str, Any]], x: str, get: Callable[[dict[str, Any]], Any]) -> Series:
    """Return `get(line)` over `line[x]`, pooled into NUM_BINS bins when there are more than MAX_POINTS lines."""
    xs, ys = [number(line.get(x)) for line in lines], [number(get(line)) for line in lines]
    if len(lines) <= MAX_POINTS:
        return Series(xs, ys)
    starts = [i * len(lines) // NUM_BINS for i in range(NUM_BINS + 1)]
    bins = [slice(a, b) for a, b in pairwise(starts)]
    present = [[y for y in ys[one] if y is not None] for one in bins]
    return Series(
        x=[mean(xs[one]) for one in bins],
        y=[mean(some) for some in present],
        low=[min(some, default=None) for some in present],
        high=[max(some, default=None) for some in present],
    )


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are there, None when none is."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


class _Bins:
    """Sums of one layer: loads per bin and expert, statistics per bin."""

    def __init__(self, num_bins: int, num_experts: int) -> None:
        self.load = [[0.0] * num_experts for _ in range(num_bins)]
        self.statistics: dict[str, list[list[float | None]]] = {
            name: [[] for _ in range(num_bins)] for name in LAYER_STATISTICS
        }

    def add(self, index: int, line: dict[str, Any]) -> None:
        load = [number(count) or 0.0 for count in line["load"]]
        if len(load) == len(self.load[index]):
            self.load[index] = [a + b for a, b in zip(self.load[index], load, strict=True)]
            for name, bins in self.statistics.items():
                bins[index].append(number(line.get(name)))

    def history(self, layer: int, used: int) -> LayerHistory:
        """Return the first `used` bins: a torn line at the end may leave the last one empty."""
        ratio = []
        for load in self.load[:used]:
            fair = sum(load) / len(load) if load else 0.0
            ratio.append([count / fair if fair else None for count in load])
        return LayerHistory(layer, ratio, {k: [mean(v) for v in bins[:used]] for k, bins in self.statistics.items()})


def load_history(run: RunFolder) -> LoadHistory:
    """Read load.jsonl once, line by line, and pool it into at most MAX_LOAD_BINS bins of equally many lines."""
    edges: list[float] = [0.0]
    layers: dict[int, _Bins] = {}
    per_bin = 1
    for i, line in enumerate(islice(run.load_lines(), run.num_load_lines)):  # a live run has written more since
        if not layers:
            cells = sum(len(layer["load"]) for layer in line["layers"]) or 1
            per_bin = -(-run.num_load_lines // max(1, min(MAX_LOAD_BINS, MAX_LOAD_CELLS // cells)))
            num_bins = -(-run.num_load_lines // per_bin)
            layers = {int(layer["layer"]): _Bins(num_bins, len(layer["load"])) for layer in line["layers"]}
        edges[i // per_bin + 1 :] = [line["step"]]
        for layer in line["layers"]:
            if int(layer["layer"]) in layers:
                layers[int(layer["layer"])].add(i // per_bin, layer)
    histories = [bins.history(layer, len(edges) - 1) for layer, bins in sorted(layers.items())]
    return LoadHistory(edges, histories, per_bin)
