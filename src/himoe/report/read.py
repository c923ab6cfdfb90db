"""Reads a run folder: the files that docs/run-folder.md describes, as plain Python values.

Tolerant where a run may have been cut off (no summary yet, a torn last line after `kill -9`), strict where the folder
is not a run folder at all. Imports neither torch nor numpy, so it answers at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from himoe.run_folder import ALARM, INTERRUPTED, PRUNED, STOPPED_EARLY, read_json


def number(value: Any) -> float | None:
    """Return `value` as a finite float, or None for anything else (missing, text, NaN, infinity)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def table(value: Any) -> dict[str, Any]:
    """Return `value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


NOTES = {
    INTERRUPTED: "This run was interrupted: the numbers are those at its last step.",
    ALARM: "An alarm stopped this run: the numbers are those at its last step.",
    PRUNED: "Its sweep ended this run early, behind others: the numbers are those at its last step.",
    STOPPED_EARLY: "This run ended before its last step, because its evaluations no longer became better.",
}


@dataclass
class RunFolder:
    """One run as its files tell it; `RunFolder.open(path)` reads it, `load_lines()` streams the largest file."""

    path: Path
    config: dict[str, Any]
    env: dict[str, Any]
    train: list[dict[str, Any]] = field(default_factory=list)
    """Training lines of metrics.jsonl, in order."""
    evals: list[dict[str, Any]] = field(default_factory=list)
    """Evaluation lines of metrics.jsonl, in order."""
    alarms: list[dict[str, Any]] = field(default_factory=list)
    """Alarm lines of metrics.jsonl, in order."""
    summary: dict[str, Any] = field(default_factory=dict)
    """summary.json, or {} when it is missing or older than the last line of metrics.jsonl (a resumed run)."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the numbers should know: lines that were skipped, a run without an end."""

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Read the folder at `path`.

        Raises:
            RunFolderError: it is missing, lacks config.json or env.json, or holds a damaged JSON document.
        """
        path = Path(path)
        run = cls(path, config=read_json(path / "config.json"), env=read_json(path / "env.json"))
        lists = {"train": run.train, "eval": run.evals, "alarm": run.alarms}
        for line in run._lines("metrics.jsonl"):
            lists.get(str(line.get("kind", "train")), []).append(line)
        run.summary = read_json(path / "summary.json") if (path / "summary.json").exists() else {}
        if run.summary and (number(run.summary.get("step")) or 0) < run._last_step:
            run.summary = {}
        if not run.summary:
            run.notes.append("This run has not ended (or was killed): the numbers are the last ones it wrote.")
        elif note := NOTES.get(str(run.summary.get("status"))):
            run.notes.append(note)
        return run

    @property
    def name(self) -> str:
        """The run's name in its configuration, else its folder's."""
        return str(self.config.get("name") or self.path.resolve().name)

    def groups(self, num_experts: int) -> list[list[int]]:
        """Return the experts of every group; one group of all for routers without groups."""
        moe = table(self.config.get("moe"))
        listed = moe.get("groups")
        if listed and sorted(expert for group in listed for expert in group) == list(range(num_experts)):
            return listed
        count = int(number(moe.get("num_groups")) or 1)
        size = num_experts // count if num_experts % count == 0 else num_experts
        return [list(range(first, first + size)) for first in range(0, num_experts, size)]

    @cached_property
    def baselines(self) -> dict[str, dict[str, Any]]:
        """Per domain, bits per byte of the byte-unigram and the byte-bigram model; none beside a score of other bytes.

        The byte models read all held-out text, an evaluation in the middle of a run perhaps a part of it.
        """
        scored = table(self.outcome.get("domains"))
        sizes = {name: number(table(scored.get(name)).get("bytes")) for name in self.held_out_bytes}
        return {
            name: table(value)
            for name, value in table(self.env.get("baselines")).items()
            if sizes.get(name) in (None, self.held_out_bytes.get(name))
        }

    @cached_property
    def held_out_bytes(self) -> dict[str, float]:
        """UTF-8 bytes of each domain's held-out text."""
        domains = table(table(self.env.get("data")).get("domains"))
        return {name: number(table(value).get("held_out_bytes")) or 0.0 for name, value in domains.items()}

    @cached_property
    def domains(self) -> list[str]:
        """Every domain the files name, in the data's order."""
        scored = [table(line.get("domains")) for line in [*self.evals, self.summary]]
        return list(dict.fromkeys(name for names in (self.held_out_bytes, *scored) for name in names))

    @cached_property
    def outcome(self) -> dict[str, Any]:
        """Final numbers in the shape of summary.json; put together from the last lines when there is none."""
        if self.summary:
            return self.summary
        last = self.train[-1] if self.train else {}
        scored = self.evals[-1] if self.evals else {}
        layers: list[Any] = []
        for line in self.load_lines():
            layers = line["layers"]
        return {
            **{key: last.get(key, scored.get(key)) for key in ("step", "tokens", "seconds", "tokens_per_second")},
            "status": "unfinished",
            "loss": scored.get("loss"),
            "bits_per_byte": scored.get("bits_per_byte"),
            "domains": scored.get("domains"),
            "layers": layers,
            "parameters": self.env.get("parameters"),
        }

    def baseline(self, model: str) -> float | None:
        """Bits per byte of the byte-"unigram" or "bigram" model over all held-out bytes, to compare with the run's."""
        pairs = [(size, number(self.baselines.get(name, {}).get(model))) for name, size in self.held_out_bytes.items()]
        known = [(size, bits) for size, bits in pairs if bits is not None]
        total = sum(size for size, _ in known)
        return sum(size * bits for size, bits in known) / total if total and len(known) == len(pairs) else None

    @cached_property
    def num_load_lines(self) -> int:
        """Lines in load.jsonl, counted without reading them into memory."""
        try:
            with (self.path / "load.jsonl").open("rb") as file:
                return sum(1 for line in file if line.strip())
        except FileNotFoundError:
            return 0

    def load_lines(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of load.jsonl, one at a time: this file may be large."""
        for line in self._lines("load.jsonl"):
            layers = line.get("layers")
            if isinstance(layers, list) and all(map(_is_layer, layers)):
                yield line

    @property
    def _last_step(self) -> float:
        return max((number(lines[-1]["step"]) or 0 for lines in (self.train, self.evals) if lines), default=0)

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the objects of a .jsonl file; skip a torn last line, and note any other damaged one."""
        path, damaged, torn = self.path / name, 0, False
        if not path.is_file():
            return
        with path.open("rb") as file:
            for raw in file:
                if not raw.strip():
                    continue
                damaged += torn
                line = _parse_line(raw)
                torn = line is None
                if line is not None:
                    yield line
        note = f"{name}: {damaged} damaged line{'s were' if damaged > 1 else ' was'} skipped."
        if damaged and note not in self.notes:
            self.notes.append(note)


def _is_layer(value: Any) -> bool:
    """Tell whether `value` is one layer of a load line."""
    return isinstance(value, dict) and number(value.get("layer")) is not None and isinstance(value.get("load"), list)


def _parse_line(raw: bytes) -> dict[str, Any] | None:
    """Return the line's object, or None when it is torn or has no step."""
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) and number(line.get("step")) is not None else None
