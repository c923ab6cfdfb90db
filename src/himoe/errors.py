"""Every error a user can meet, as one family.

A message says where, what was given, what is allowed and what to do. The command line prints it as one line and exits
with status 2; a traceback appears only with `--debug`. Faults of our own (broken invariants) stay `AssertionError`.
"""

import difflib
from collections.abc import Iterable, Mapping


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for a near miss, else an empty string; of a mapping, x is the nearest key's value.

    >>> nearest("sofmax", ["sigmoid", "softmax"])
    "; did you mean 'softmax'?"
    """
    for close in difflib.get_close_matches(name, list(known), n=1):
        return f"; did you mean {(known[close] if isinstance(known, Mapping) else close)!r}?"
    return ""


class HimoeError(Exception):
    """Base of all errors that a user can cause and mend."""


class ConfigError(HimoeError):
    """A configuration or an argument that cannot work: unknown key, wrong type, impossible combination."""


class GuardError(ConfigError):
    """A combination known to fail in training, refused unless forced."""


class DataError(HimoeError):
    """Input text or a token file that cannot be used."""


class RunFolderError(HimoeError):
    """A run folder that exists already, is missing, or lacks a file."""


class RunInUseError(RunFolderError):
    """A run folder that another process writes to right now."""


class CheckpointError(HimoeError):
    """A checkpoint that is damaged, foreign, or does not fit the model."""


class RunsFailedError(HimoeError):
    """So many runs failed that there is nothing to say of the rest."""


class KernelError(HimoeError):
    """A kernel that could not finish its work."""


class MissingExtraError(HimoeError):
    """An optional dependency that is not installed; names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; install it with: pip install 'himoe[{extra}]'")


class HimoeWarning(UserWarning):
    """Something that runs but is likely not what was meant; names the numbers."""
