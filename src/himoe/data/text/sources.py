"""Files and folders, read as documents per domain, in units that processes can share.

Of a table (JSON lines, Parquet, Arrow) every row is a document; any other file must be UTF-8 text, which is cut at
blank lines where it is long, so that a domain that is one long file still has documents to hold out. What a folder
gives is told in `folders`. JSON lines and text may be compressed (`.gz`, `.zst`).
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from himoe.data.text.columns import Columns
from himoe.data.text.folders import domains
from himoe.data.text.formats import fault, form, read_json_lines, read_text
from himoe.data.text.tables import read_table, table_ranges
from himoe.errors import DataError

UNIT = 32 * 2**20  # bytes of source that one process prepares at a time
MANY = 1024  # files of one unit at most, so that a unit stays small to hand over
NAMED = 5  # bad files named in an error

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
    newest: int = 0  # time of the last change of any file, ns

    @functools.cached_property
    def units(self) -> list[Unit]:
        """The units in their fixed order; the files are looked into here, which may raise `DataError`."""
        return self.find_units()


def read_source(
    path: Path, *, text_column: str = "text", domain_column: str | None = None, unit_size: int = UNIT
) -> Source:
    """Return the text of a file or folder; of tables, the rows' `text_column`, and `domain_column` names their domains.

    Raises `DataError` when it is missing or holds no files; `units` of the result look into them.
    """
    path = Path(path)
    return _source(path.resolve().name, {None: path}, Columns(text_column, domain_column), unit_size)


def read_sources(paths: Mapping[str, Path], *, text_column: str = "text", unit_size: int = UNIT) -> Source:
    """Return several files or folders as one source, each of them one domain of the given name."""
    return _source("+".join(paths), {name: Path(path) for name, path in paths.items()}, Columns(text_column), unit_size)


def _source(name: str, paths: Mapping[str | None, Path], columns: Columns, unit_size: int) -> Source:
    """Return the files of some paths as a source; None stands for the domains that the files themselves give."""
    files: list[_File] = []
    for given, root in paths.items():
        try:
            found = domains(root)
            if given is not None:
                found = {given: [file for part in found.values() for file in part]}
            for domain, part in found.items():
                files += [_File(file, root, domain, len(part) == 1, file.stat()) for file in part]
        except OSError as error:
            raise DataError(f"{root}: cannot be read: {error.strerror}; give a UTF-8 text file or a folder") from error
    if columns.domain is not None and all(form(file.path)[0] == "text" for file in files):
        raise DataError(
            f"{name}: there are only text files, and they have no column {columns.domain!r}; leave data.domain_column "
            "out, a sub-folder or file is a domain then"
        )
    digest = hashlib.sha256(repr((columns, unit_size)).encode())
    for file in files:
        times = file.stat.st_mtime_ns, file.stat.st_ctime_ns  # the second tells where the first was set back
        digest.update(repr((str(file.path.absolute()), file.domain, file.stat.st_size, times)).encode())
    newest = max((file.stat.st_mtime_ns for file in files), default=0)
    return Source(name, partial(_units, files, columns, unit_size), digest.hexdigest(), newest=newest)


@dataclass(frozen=True)
class _File:
    """A file to read, as it was found."""

    path: Path
    root: Path  # what was given
    domain: str
    lone: bool  # all of its domain
    stat: os.stat_result

    @property
    def label(self) -> str:
        return self.path.name if self.path == self.root else str(self.path.relative_to(self.root))


def _units(files: Sequence[_File], columns: Columns, unit_size: int) -> list[Unit]:
    """Return the units of all files: big files in parts, small ones together."""
    bad = [(file, reason) for file in files if (reason := fault(file.path))]
    if bad:
        shown = ", ".join(f"{file.label} ({reason})" for file, reason in bad[:NAMED])
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise DataError(
            f"{bad[0][0].root}: {len(bad)} of {len(files)} files cannot be used: {shown}{more}; "
            "data must be UTF-8 text, take other files out or hide them with a leading dot"
        )
    units: list[Unit] = []
    group, size = [], 0
    for part in (part for file in files for part in _parts(file, columns, unit_size)):
        if group and (len(group) == MANY or size + part.size > unit_size):
            units.append(_together(group))
            group, size = [], 0
        group.append(part)
        size += part.size
    return [*units, _together(group)] if group else units


def _together(group: list[Unit]) -> Unit:
    """Return several units as one."""
    if len(group) == 1:
        return group[0]
    label = f"{group[0].label} … {group[-1].label} ({len(group)} files)"
    return Unit(label, sum(unit.size for unit in group), tuple(part for unit in group for part in unit.parts))


def _parts(file: _File, columns: Columns, unit_size: int) -> Iterator[Unit]:
    """Yield the parts of one file, each as a unit of its own."""
    kind, compression, _ = form(file.path)
    if kind in ("parquet", "arrow"):
        for first, last, size in table_ranges(file.path, columns, unit_size):
            read = partial(read_table, file.path, file.domain, columns, first, last)
            yield Unit(f"{file.label}[groups {first}:{last}]", size, (read,))
        return
    size = file.stat.st_size
    whole = bool(compression) or size <= unit_size
    read = (
        partial(read_text, file.path, file.domain, lone=file.lone and whole)
        if kind == "text"
        else partial(read_json_lines, file.path, file.domain, columns)
    )
    if whole:
        yield Unit(file.label, size, (read,))
        return
    for start in range(0, size, unit_size):
        stop = min(start + unit_size, size)
        yield Unit(f"{file.label}[{start}:{stop}]", stop - start, (partial(read, start=start, stop=stop),))
