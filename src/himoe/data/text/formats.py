"""Text and JSON lines, plain or compressed, as streams of documents.

Nothing is ever read whole: text is cut on its way; one line of JSON is one document, of at most `LONGEST` bytes. A
range of a plain file holds the documents that begin in it, so its neighbours need not be read first.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from himoe.data.text.columns import Columns, UnusableError
from himoe.data.text.cutting import document_start, lone_pieces, pieces
from himoe.errors import DataError, MissingExtraError

CHUNK = 2**20  # bytes read at a time
ZSTD_INPUT = 2**10  # compressed bytes read at a time: four of them can stand for as much as 2¹⁷
LONGEST = 64 * 2**20  # bytes of one line of JSON
HEAD = 8 * 2**10  # bytes looked at to see whether a file can be used
COMPRESSED = (".gz", ".zst")
TABLES = {".jsonl": "json lines", ".ndjson": "json lines", ".parquet": "parquet", ".arrow": "arrow"}

Documents = Iterator[tuple[str, str]]  # (domain, text)


def form(path: Path) -> tuple[str, str, str]:
    """Return what the name of a file tells: how it is read, its compression if any, and the name without endings.

    >>> form(Path("a.jsonl.gz")), form(Path("notes.md"))
    (('json lines', '.gz', 'a'), ('text', '', 'notes'))
    """
    compression = path.suffix.lower() if path.suffix.lower() in COMPRESSED else ""
    inner = path.with_suffix("") if compression else path
    return TABLES.get(inner.suffix.lower(), "text"), compression, inner.stem


def fault(path: Path) -> str | None:
    """Return why a file cannot be used, as far as its name, and of text and JSON lines the first bytes, tell."""
    kind, compression, _ = form(path)
    if kind in ("parquet", "arrow"):
        return f"{kind} inside {compression}, which cannot be read in parts: decompress it" if compression else None
    head = b""
    try:
        for chunk in chunks(path, size=HEAD):
            head += chunk
            if len(head) >= HEAD:
                break
    except DataError as error:
        return str(error).removeprefix(f"{path}: ")
    if not head.strip() and len(head) < HEAD:
        return "empty"
    if b"\0" in head:
        return "binary"
    try:
        head.decode()
    except UnicodeDecodeError as error:
        if len(head) < HEAD or error.start < len(head) - 3:  # else a character may go on after the head
            return f"not UTF-8 at byte {error.start}"
    return None


def chunks(path: Path, start: int = 0, stop: int | None = None, *, size: int = CHUNK) -> Iterator[bytes]:
    """Yield the bytes of a file decompressed, some `size` at a time; of a plain file also a range of them.

    Raises `DataError` where the file cannot be read, is damaged, or ends before `stop`.
    """
    compression = form(path)[1]
    try:
        if compression == ".gz":
            with gzip.open(path) as file:
                while chunk := file.read(size):
                    yield chunk
        elif compression == ".zst":
            yield from _zstd_chunks(path, size)
        else:
            yield from _plain_chunks(path, start, stop, size)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip data: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: unreadable: {error.strerror or error}") from error


def read_text(path: Path, domain: str, start: int = 0, stop: int | None = None, *, lone: bool = False) -> Documents:
    """Yield the documents of a text file, or of a plain one those that begin in a range; joined they are the text.

    `lone` says that the file is all of its domain.
    """
    position = document_start(path, start)
    end = None if stop is None else max(position, document_start(path, stop))
    for piece in (lone_pieces if lone else pieces)(chunks(path, position, end)):
        if (at := piece.find(b"\0")) >= 0:
            raise DataError(f"{path}: binary: there is a zero at byte {position + at}; data must be UTF-8 text")
        try:
            yield domain, piece.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 at byte {position + error.start}; data must be UTF-8 text") from error
        position += len(piece)


def read_json_lines(
    path: Path, domain: str, columns: Columns, start: int = 0, stop: int | None = None, *, longest: int = LONGEST
) -> Documents:
    """Yield the text of every line of a JSON lines file, or of a plain one of the lines that begin in a range.

    Blank lines are passed over, and so are lines whose text is blank.
    """
    begin = _line_start(path, start, stop)
    for number, line in enumerate(_lines(path, begin, stop, longest), 1):
        try:
            found, text = _record(line, columns, longest)
        except UnusableError as error:
            before = sum(chunk.count(b"\n") for chunk in chunks(path, 0, begin)) if begin else 0
            raise DataError(f"{path}: line {before + number}: {error}") from error
        if text and not text.isspace():
            yield domain if found is None else found, text


def _record(line: bytes, columns: Columns, longest: int) -> tuple[str | None, str]:
    """Return (domain, text) of one line of JSON."""
    if len(line) > longest:
        raise UnusableError(
            f"more than {longest:,} bytes; a line is one document: divide it, or give the text as a .txt file, "
            "which is cut into documents"
        )
    if not line or line.isspace():
        return None, ""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UnusableError(f"not UTF-8 at byte {error.start} of the line; data must be UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise UnusableError(f"not JSON: {error}; every line must be one JSON object") from error
    if not isinstance(record, dict):
        raise UnusableError("JSON, but not an object with columns; every line must be one JSON object")
    columns.check(list(record))
    found, text = columns.read(record[columns.text], record.get(columns.domain))
    if b"\\u" in line:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UnusableError(
                f"column {columns.text!r} holds half a surrogate pair at character {error.start}, which is no text"
            ) from error
    return found, text


def _line_start(path: Path, start: int, stop: int | None) -> int:
    """Return where the first line that begins at or after byte `start` begins, or `stop` if none does before it."""
    if start <= 0:
        return 0
    position = start - 1
    for chunk in chunks(path, position, stop):
        if (at := chunk.find(b"\n")) >= 0:
            return position + at + 1
        position += len(chunk)
    return position


def _lines(path: Path, begin: int, stop: int | None, longest: int) -> Iterator[bytes]:
    """Yield the lines that begin between two bytes without their ends, of one too long only a part and nothing more."""
    position = begin  # of the line that is being put together
    held: list[bytes] = []
    length = 0
    if stop is not None and begin >= stop:
        return
    for chunk in chunks(path, begin):
        first, *others = chunk.split(b"\n")
        held.append(first)
        length += len(first)
        for other in others:
            yield b"".join(held)
            position += length + 1
            if length > longest or (stop is not None and position >= stop):
                return
            held, length = [other], len(other)
        if length > longest:
            break
    if length:
        yield b"".join(held)


def _plain_chunks(path: Path, start: int, stop: int | None, size: int) -> Iterator[bytes]:
    """Yield the bytes of a range of a file."""
    with path.open("rb") as file:
        file.seek(start)
        while stop is None or start < stop:
            chunk = file.read(size if stop is None else min(size, stop - start))
            if not chunk and stop is not None:
                raise DataError(f"{path}: ends at byte {start}, earlier than before: it changed while it was read")
            if not chunk:
                return
            start += len(chunk)
            yield chunk


def _zstd_chunks(path: Path, size: int) -> Iterator[bytes]:
    """Yield the bytes of all frames of a zstd file; the library's own reader takes a cut file for a whole one."""
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtraError("zstandard", "data") from error
    frame, held, length = None, [], 0
    with path.open("rb") as file:
        try:
            while data := file.read(ZSTD_INPUT):
                while data:
                    frame = frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
                    held.append(frame.decompress(data))
                    length += len(held[-1])
                    data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
                if length >= size:
                    yield b"".join(held)
                    held, length = [], 0
        except zstandard.ZstdError as error:
            raise DataError(f"{path}: damaged zstd data: {error}") from error
    if frame is not None:
        raise DataError(f"{path}: damaged zstd data: it ends inside a frame")
    yield b"".join(held)
