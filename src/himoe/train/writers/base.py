"""What every writer is, what it is told of its run, and the one way from a line to names and numbers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

PROJECT = "himoe"
POSITION = ("kind", "step")  # of a line, not measured


class Writer(Protocol):
    """Takes the lines of a run as they come, those of `metrics.jsonl` and of `load.jsonl`."""

    def log(self, line: Mapping[str, Any], /) -> None:
        """Write one line."""
        ...

    def close(self) -> None:
        """Write what is still held back; no line comes after this."""
        ...


@dataclass(frozen=True)
class RunIdentity:
    """The run that writers write for.

    Attributes:
        folder: the run folder.
        name: for people.
        id: the same for every process of the run, wherever its folder lies; another one for every other run.
        step: optimizer steps done when this process begins; above 0 it goes on with an earlier one's run.
        config: flat, `{"train.steps": 20, …}`.
    """

    folder: Path
    name: str
    id: str
    step: int
    config: dict[str, Any]

    @classmethod
    def of(cls, folder: Path, config: Mapping[str, Any], env: Mapping[str, Any], *, step: int = 0) -> Self:
        """Return the identity of a run folder, from its configuration and its `env.json`, which a resumed run keeps."""
        return cls(folder, folder.resolve().name, env["id"], step, dict(_leaves(config, ".")))


def flatten(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line under names for a chart; what is no number is left out.

    >>> flatten({"kind": "eval", "step": 5, "loss": 2.5, "domains": {"code": {"bits_per_byte": 1.5}}})
    {'eval/loss': 2.5, 'eval/domain/code/bits_per_byte': 1.5}
    >>> flatten({"step": 5, "layers": [{"layer": 3, "load": [4, 4], "max_vio_window": 0.0}]})
    {'layer/3/max_vio_window': 0.0}
    """
    if "layers" in line and "kind" not in line:
        records = ({f"layer/{record['layer']}": record} for record in line["layers"])
        named = [leaf for record in records for leaf in _leaves(record, "/") if not leaf[0].endswith("/layer")]
    else:
        own = {key: value for key, value in line.items() if key not in (*POSITION, "domains")}
        named = list(_leaves({line["kind"]: {**own, "domain": line.get("domains", {})}}, "/"))
    return {name: float(value) for name, value in named if type(value) in (int, float)}


def _leaves(tree: Mapping[str, Any], separator: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value that is no mapping, with the path that leads to it."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, separator, f"{prefix}{key}{separator}")
        else:
            yield f"{prefix}{key}", value
