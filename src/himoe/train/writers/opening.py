"""Names of writers to writers: checked before a run begins, opened when it does, dropped when one fails."""

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from himoe.errors import HimoeWarning, MissingExtraError
from himoe.train.writers.base import RunIdentity, Writer

WRITERS = {
    "tensorboard": "himoe.train.writers.tensorboard:TensorBoard",
    "trackio": "himoe.train.writers.trackio:Trackio",
    "wandb": "himoe.train.writers.wandb:WandB",
    "mlflow": "himoe.train.writers.mlflow:MLflow",
}
"""Name, which is also the package's and the extra's → `"module:Class"`; the class takes a `RunIdentity`."""


def check_writers(names: Sequence[str]) -> None:
    """Raise MissingExtraError unless the packages of all `names` are installed; imports none of them."""
    for name in names:
        found = find_spec(name)
        if found is None or found.origin is None:  # a mere folder of that name, as wandb leaves where it ran
            raise MissingExtraError(name, name)


class Guarded:
    """Several writers as one that never fails: the first error of each is a warning, and it gets no further line.

    Args:
        writers: by name.
        warn: receives the text of a warning; None for Python's warnings.
    """

    def __init__(self, writers: Mapping[str, Writer], *, warn: Callable[[str], None] | None = None) -> None:
        self._writers, self._warn = dict(writers), warn or _warn

    def log(self, line: Mapping[str, Any]) -> None:
        """Hand the line to every writer that still works."""
        for name in list(self._writers):
            self._guard(name, lambda writer: writer.log(line))

    def close(self) -> None:
        """Close every writer that still works."""
        for name in list(self._writers):
            self._guard(name, lambda writer: writer.close())
        self._writers.clear()

    def _guard(self, name: str, call: Callable[[Writer], None]) -> None:
        try:
            call(self._writers[name])
        except Exception as error:  # whatever somebody else's library raises, training goes on
            del self._writers[name]
            self._warn(f"{name} failed and gets no more lines ({_one_line(error)}); training goes on")


def open_writers(names: Sequence[str], run: RunIdentity, *, warn: Callable[[str], None] | None = None) -> Guarded:
    """Open the writers called `names`; one that cannot be opened is a warning too."""
    opened: dict[str, Writer] = {}
    for name in names:
        module, _, attribute = WRITERS[name].partition(":")
        try:
            opened[name] = getattr(importlib.import_module(module), attribute)(run)
        except Exception as error:  # as above
            (warn or _warn)(f"{name} cannot be opened ({_one_line(error)}); training goes on without it")
    return Guarded(opened, warn=warn)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _warn(text: str) -> None:
    warnings.warn(text, HimoeWarning, stacklevel=2)
