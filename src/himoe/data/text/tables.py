"""Parquet and Arrow files as streams of documents, by pyarrow: only the wanted columns, a few rows at a time.

A file is divided where it is divided already: a Parquet file into row groups, an Arrow file into record batches. Both
are called groups here.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from himoe.data.text.columns import Columns, UnusableError
from himoe.data.text.formats import CHUNK, Documents
from himoe.errors import DataError, MissingExtraError

ROWS = 128  # turned into Python strings at a time
ARROW_FILE = b"ARROW1"  # opens a file with an index; one without it is a stream, as `datasets` writes them

Group = tuple[int, int, Callable[[], Iterable[Any]]]  # rows, bytes of text, and a way to read it as record batches


def table_ranges(path: Path, columns: Columns, unit_size: int) -> list[tuple[int, int, int]]:
    """Return (first, last + 1, bytes of text) of runs of groups that have about `unit_size` bytes each.

    Raises `DataError` where the file is damaged or lacks a column.
    """
    ranges: list[tuple[int, int, int]] = []
    with _faults_named(path):
        for i, (_, size, _) in enumerate(_groups(path, columns)):
            if ranges and ranges[-1][2] + size <= unit_size:
                ranges[-1] = (ranges[-1][0], i + 1, ranges[-1][2] + size)
            else:
                ranges.append((i, i + 1, size))
    return ranges


def read_table(path: Path, domain: str, columns: Columns, first: int = 0, last: int | None = None) -> Documents:
    """Yield the text of the rows of a run of groups; rows whose text is blank are passed over."""
    row = 0
    with _faults_named(path):
        for i, (rows, _, batches) in enumerate(itertools.islice(_groups(path, columns), last)):
            if i < first:
                row += rows
                continue
            for values in _rows(batches(), columns):
                row += 1
                try:
                    found, text = columns.read(*values)
                except UnusableError as error:
                    raise UnusableError(f"row {row}: {error}") from error
                if text and not text.isspace():
                    yield domain if found is None else found, text


def _rows(batches: Iterable[Any], columns: Columns) -> Iterator[tuple]:
    """Yield the values of the wanted columns, row by row."""
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS):
            yield from zip(*(batch.column(name).slice(start, ROWS).to_pylist() for name in columns.names), strict=True)


def _groups(path: Path, columns: Columns) -> Iterator[Group]:
    """Yield the groups of a file in order; one that is not asked for its batches is not read."""
    return (_row_groups if path.suffix.lower() == ".parquet" else _record_batches)(path, columns)


def _row_groups(path: Path, columns: Columns) -> Iterator[Group]:
    """Yield the row groups of a Parquet file."""
    from pyarrow import parquet

    with parquet.ParquetFile(path, buffer_size=CHUNK) as file:
        columns.check(file.schema_arrow.names)
        for i in range(file.num_row_groups):
            group = file.metadata.row_group(i)
            leaves = [group.column(j) for j in range(group.num_columns)]
            size = sum(leaf.total_uncompressed_size for leaf in leaves if leaf.path_in_schema == columns.text)
            yield group.num_rows, size, partial(file.iter_batches, ROWS, row_groups=[i], columns=columns.names)


def _record_batches(path: Path, columns: Columns) -> Iterator[Group]:
    """Yield the record batches of an Arrow file or stream, which is mapped into memory."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        indexed = file.read(len(ARROW_FILE)) == ARROW_FILE
        file.seek(0)
        reader = pyarrow.ipc.open_file(file) if indexed else pyarrow.ipc.open_stream(file)
        columns.check(reader.schema.names)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if indexed else reader
        for batch in batches:
            yield batch.num_rows, batch.column(columns.text).nbytes, partial(iter, (batch,))


@contextlib.contextmanager
def _faults_named(path: Path) -> Iterator[None]:
    """Turn everything that can be wrong with a table into a `DataError` that names its file."""
    try:
        import pyarrow
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data") from error
    try:
        yield
    except UnusableError as error:
        raise DataError(f"{path}: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: a text in it is not UTF-8: {error.reason} at its byte {error.start}") from error
    except (pyarrow.ArrowException, KeyError, OSError) as error:  # KeyError: two columns of one name
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not a file of {path.suffix[1:]} rows, or a damaged one: {reason}") from error
