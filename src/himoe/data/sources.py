"""Text files and folders, read as documents per domain, in units that processes can share.

A file is one domain, named by its stem. In a folder every first-level sub-folder or file is a domain. Hidden entries
are skipped, every other regular file must be UTF-8 text. One file is one document; a big file is cut at blank lines, so
that a domain that is one long file still has documents to hold out.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from himoe.data.cutting import document_start, lone_pieces, pieces
from himoe.errors import DataError

UNIT = 32 * 2**20  # bytes of source that one process prepares at a time
MANY = 1024  # files of one unit at most, so that a unit stays small to hand over
CHUNK = 2**20  # bytes read at a time

Part = Callable[[], Iterator[tuple[str, str]]]  # reads the documents of one file, or of a part of it


@dataclass(frozen=True)
class Unit:
    """A piece of work that one process prepares: many small files, or a part of a big one. Small to pickle.

    `label` names it in errors and progress, `size` is its source bytes, about.
    """

    label: str
    size: int
    parts: tuple[Part, ...]

    def documents(self) -> Iterator[tuple[str, str]]:
        """Yield (domain, text) in source order, holding little of it at a time.

        Raises `DataError` naming file and place where something cannot be read as text.
        """
        for part in self.parts:
            yield from part()


@dataclass(frozen=True)
class Source:
    """Text to prepare: its name, how to find its units, and a cheap identity.

    An equal `signature` means that nothing need be read again; None that it always must.
    """

    name: str
    find_units: Callable[[], list[Unit]]
    signature: str | None
    minimum_held_out: int = 1  # bytes held out of every domain, whatever the wanted fraction gives

    @functools.cached_property
    def units(self) -> list[Unit]:
        """The units in their fixed order; the files are looked into here, which may raise `DataError`."""
        return self.find_units()


def read_source(
    path: Path, *, text_column: str = "text", domain_column: str | None = None, unit_size: int = UNIT
) -> Source:
    """Return the text of a file or folder.

    Raises `DataError` when it is missing or holds no files.
    """
    path = Path(path)
    try:
        files = _domains(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; give a UTF-8 text file or a folder") from error
    signature = _signature(path, files, [text_column, domain_column])
    return Source(path.resolve().name, partial(_units, path, files, unit_size), signature)


def read_sources(paths: Mapping[str, Path], *, text_column: str = "text", unit_size: int = UNIT) -> Source:
    """Return several files or folders as one source, each of them one domain of the given name."""
    sources = {name: read_source(path, text_column=text_column, unit_size=unit_size) for name, path in paths.items()}

    def units() -> list[Unit]:
        return [
            Unit(unit.label, unit.size, tuple(partial(_renamed, part, name) for part in unit.parts))
            for name, source in sources.items()
            for unit in source.units
        ]

    identity = repr([(name, source.signature) for name, source in sources.items()])
    return Source("+".join(sources), units, hashlib.sha256(identity.encode()).hexdigest())


def _renamed(part: Part, name: str) -> Iterator[tuple[str, str]]:
    """Yield the documents of a part as those of the domain `name`."""
    for _, text in part():
        yield name, text


def _signature(root: Path, files: Mapping[str, Sequence[Path]], options: list) -> str:
    """Return the hex hash of where the files lie, their sizes and times, and how they are read."""
    digest = hashlib.sha256(repr((str(root.resolve()), options)).encode())
    for domain, paths in files.items():
        for path in paths:
            stat = path.stat()
            digest.update(repr((domain, _relative(path, root), stat.st_size, stat.st_mtime_ns)).encode())
    return digest.hexdigest()


def _units(root: Path, files: Mapping[str, Sequence[Path]], unit_size: int) -> list[Unit]:
    """Return the units of all files: big files in ranges, small ones together."""
    parts: list[tuple[str, int, Part]] = []
    for domain, paths in files.items():
        for path in paths:
            size, name = path.stat().st_size, _relative(path, root)
            if size <= unit_size:
                parts.append((name, size, partial(read_text, path, domain, lone=len(paths) == 1)))
                continue
            for start in range(0, size, unit_size):
                stop = min(start + unit_size, size)
                parts.append((f"{name}[{start}:{stop}]", stop - start, partial(read_text, path, domain, start, stop)))
    return _grouped(parts, unit_size)


def _grouped(parts: list[tuple[str, int, Part]], unit_size: int) -> list[Unit]:
    """Put parts that follow each other together, up to the unit size."""
    units: list[Unit] = []
    group: list[tuple[str, int, Part]] = []
    for part in [*parts, None]:
        full = sum(size for _, size, _ in group) + (part[1] if part else 0) > unit_size or len(group) == MANY
        if group and (part is None or full):
            label = group[0][0] if len(group) == 1 else f"{group[0][0]} … {group[-1][0]} ({len(group)} files)"
            units.append(Unit(label, sum(size for _, size, _ in group), tuple(read for _, _, read in group)))
            group = []
        if part:
            group.append(part)
    return units


def read_text(
    path: Path, domain: str, start: int = 0, stop: int | None = None, *, lone: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield the documents of a text file, or those that begin in a range of its bytes."""
    size = path.stat().st_size
    begin = document_start(path, start)
    end = size if stop is None or stop >= size else document_start(path, stop)
    for piece in (lone_pieces if lone else pieces)(_chunks(path, begin, end)):
        yield domain, piece.decode()


def _chunks(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """Yield the bytes of a range of a file."""
    with path.open("rb") as file:
        file.seek(start)
        while start < stop and (chunk := file.read(min(CHUNK, stop - start))):
            start += len(chunk)
            yield chunk


def _domains(folder: Path) -> dict[str, list[Path]]:
    """Return the files of every domain of a folder, both in name order, or of the one domain that a file is."""
    if folder.is_file():
        return {folder.stem: [folder]}
    if not folder.is_dir():
        reason = "neither a file nor a folder" if folder.exists() else "no such file or folder"
        raise DataError(f"{folder}: {reason}; give a UTF-8 text file or a folder of them")
    domains: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        name, files = (entry.name, _walk(entry)) if entry.is_dir() else (entry.stem, [entry] * entry.is_file())
        if files and name in domains:
            raise DataError(f"{folder}: two entries give the domain {name!r}, one is {entry.name}; rename one of them")
        if files:
            domains[name] = files
    if not domains:
        raise DataError(f"{folder}: holds no files; put text files in it, each file or sub-folder is one domain")
    return domains


def _walk(folder: Path) -> list[Path]:
    """Return the regular files under `folder`, sorted, hidden files and folders left out."""
    found = []
    for root, folders, names in os.walk(folder, onerror=_fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(file for file in found if file.is_file())


def _fail(error: OSError) -> None:
    """Raise what `os.walk` would pass over: a folder that may not be read must not go missing unnoticed."""
    raise error


def _relative(file: Path, root: Path) -> str:
    """Return the name of `file` as seen from `root`."""
    return file.name if file == root else str(file.relative_to(root))
