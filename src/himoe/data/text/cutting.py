"""Long text into documents: cut at blank lines, else line ends, never inside a character.

The bytes may come as a stream of any length; what is held of it at a time is one chunk and a few pieces. A file cut in
ranges first is cut at the same places whatever order the ranges are read in, because a range begins where
`document_start` finds a place to begin, and that looks at the file alone.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

PIECE = 16 * 1024  # bytes; a text of more than four of these is cut into documents of one to four
LONE = 32 * PIECE  # bytes below which a text that is all of a domain is cut finer, to have documents to hold out
FINEST = 256  # bytes of the smallest such documents


def cut(text: str, piece: int = PIECE) -> list[str]:
    r"""Cut a text longer than `4 * piece` bytes at the first blank line, else line end, after each `piece` bytes.

    Pieces have `piece` to about `4 * piece` bytes, the last one perhaps fewer, and joined they are the text again.

    >>> cut("one\n\ntwo\nthree\n", 3)
    ['one\n\n', 'two\n', 'three\n']
    """
    return [part.decode() for part in pieces([text.encode()], piece)] or [text]


def pieces(chunks: Iterable[bytes], piece: int = PIECE) -> Iterator[bytes]:
    """Yield UTF-8 text that comes in chunks as pieces of `piece` to about `4 * piece` bytes, the last perhaps fewer."""
    held, start, ended = b"", 0, False
    source = iter(chunks)
    enough = 4 * piece  # up to here a text stays whole; later a rest of half of it does
    while True:
        while not ended and len(held) - start <= 4 * piece + 3:
            chunk = next(source, None)
            ended = chunk is None
            held, start = (held, start) if chunk is None else (held[start:] + chunk, 0)
        if len(held) - start <= enough:
            break
        end = _end(held, start, piece)
        yield held[start:end]
        start, enough = end, 2 * piece
    if start < len(held):
        yield held[start:]


def lone_pieces(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the pieces of a text that is all of its domain: finer ones where the text is short."""
    source, held = iter(chunks), b""
    while len(held) < LONE and (chunk := next(source, None)) is not None:
        held += chunk
    piece = max(len(held) // 32, FINEST) if len(held) < LONE else PIECE

    def all_chunks() -> Iterator[bytes]:
        yield held
        yield from source

    return pieces(all_chunks(), piece)


def document_start(path: Path, offset: int, piece: int = PIECE) -> int:
    """Return where the first document at or after byte `offset` of a text file begins.

    That is after the first blank line of the next `4 * piece` bytes, else after the first line end, else at the next
    character. A greater offset never gives an earlier start.
    """
    if offset <= 0:
        return 0
    with path.open("rb") as file:
        file.seek(offset - 1)
        window = file.read(4 * piece + 4)
    for mark in (b"\n\n", b"\n"):
        if (at := window.find(mark, 0, 4 * piece)) >= 0:
            return offset - 1 + at + len(mark)
    start = 1
    while start < len(window) and window[start] & 0xC0 == 0x80:
        start += 1
    return offset - 1 + start


def _end(held: bytes, start: int, piece: int) -> int:
    """Return where the piece that begins at `start` ends."""
    low, high = start + piece, min(start + 4 * piece, len(held))
    for mark in (b"\n\n", b"\n"):
        if (at := held.find(mark, low - 1, high)) >= 0:
            return at + len(mark)
    while high < len(held) and held[high] & 0xC0 == 0x80:  # never inside a character
        high += 1
    return high
