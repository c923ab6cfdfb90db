"""Files that are either whole or not there, also where several processes write the same one at the same time.

A process that is killed while it writes leaves `NAME.PID.tmp`; whoever owns a folder clears these away.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def partial_name(path: Path) -> Path:
    """Return the name under which this process writes a file that is not complete yet."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write; it takes the name `path` when the block ends well and it is safe on disk."""
    partial = partial_name(path)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a text in one step."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Replace `path` by a JSON document in one step. Raises ValueError for a number that is not finite."""
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def sync_folder(path: Path) -> None:
    """Make renames inside `path` survive a power cut, where the system can."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
