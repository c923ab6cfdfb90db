"""`metrics.jsonl` and `load.jsonl`: the writer that every run has, and the only one whose failure ends a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from himoe.run_folder import Log


class JsonLines:
    """Appends every line to the file of its kind, flushed, so that a reader can follow the run.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._metrics, self._load = Log(folder / "metrics.jsonl"), Log(folder / "load.jsonl")

    def log(self, line: Mapping[str, Any]) -> None:
        """Write one line. Raises ValueError for a number that is not finite, OSError for a full disk."""
        (self._load if "layers" in line else self._metrics).append(line)

    def close(self) -> None:
        """Close both files."""
        self._metrics.close()
        self._load.close()
