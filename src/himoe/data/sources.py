"""Text files and folders, read as documents per domain.

A file is one domain, named by its stem. In a folder every first-level sub-folder or file is a domain. Hidden entries are
skipped, every other regular file must be UTF-8 text. One file is one document; a big file is cut at blank lines, so that
a domain that is one long file still has documents to hold out.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from himoe.errors import DataError

WHOLE = 64 * 1024  # bytes; a file up to this size stays one document
PIECE = 16 * 1024  # bytes; about where a bigger one is cut
NAMED = 5  # bad files named in an error


@dataclass(frozen=True)
class Source:
    """Text to prepare: where it comes from, a hash of it, and how to get its documents by domain."""

    name: str
    fingerprint: str
    load: Callable[[], dict[str, list[str]]]
    minimum_held_out: int = 1  # bytes held out of every domain, whatever the wanted fraction gives


def read_source(path: Path) -> Source:
    """Return the text of a file or folder.

    Raises `DataError` when it is missing or holds no text, or names the files that are empty, binary or not UTF-8.
    """
    path = Path(path)
    if path.is_file():
        files = {path.stem: [path]}
    elif path.is_dir():
        files = _domains(path)
    else:
        reason = "neither a file nor a folder" if path.exists() else "no such file or folder"
        raise DataError(f"{path}: {reason}; give a UTF-8 text file or a folder of them")
    texts, bad = _read(files)
    if bad:
        total = sum(map(len, files.values()))
        shown = ", ".join(f"{_relative(file, path)} ({reason})" for file, reason in bad[:NAMED])
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise DataError(f"{path}: {len(bad)} of {total} files cannot be used: {shown}{more}; "
                        "data must be UTF-8 text, take other files out or hide them with a leading dot")  # fmt: skip
    digest = hashlib.sha256()
    for domain, contents in texts.items():
        digest.update(repr((domain, [hashlib.sha256(content).hexdigest() for content in contents])).encode())
    return Source(path.resolve().name, digest.hexdigest(), lambda: _documents(texts))


def cut(content: bytes, piece: int = PIECE) -> list[bytes]:
    r"""Cut UTF-8 text longer than `4 * piece` at the first blank line, else line end, after each `piece` bytes.

    Pieces have `piece` to `4 * piece` bytes, the last one perhaps fewer, and joined they are the text again.

    >>> cut(b"one\n\ntwo\nthree\n", 3)
    [b'one\n\n', b'two\n', b'three\n']
    """
    pieces, start = [], 0
    while len(content) > 4 * piece and len(content) - start > 2 * piece:
        low, high = start + piece, start + 4 * piece
        end = next((at + len(mark) for mark in (b"\n\n", b"\n") if (at := content.find(mark, low - 1, high)) >= 0), high)
        while end < len(content) and content[end] & 0xC0 == 0x80:  # never inside a character
            end += 1
        pieces.append(content[start:end])
        start = end
    return [*pieces, content[start:]] if start < len(content) else pieces


def _domains(folder: Path) -> dict[str, list[Path]]:
    """Return the files of every domain of a folder, both in name order."""
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
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(file for file in found if file.is_file())


def _read(files: dict[str, list[Path]]) -> tuple[dict[str, list[bytes]], list[tuple[Path, str]]]:
    """Return the content of every domain's files, and the files that are not text with the reason."""
    texts: dict[str, list[bytes]] = {domain: [] for domain in files}
    bad = []
    for domain, paths in files.items():
        for path in paths:
            try:
                content = path.read_bytes()
            except OSError as error:
                bad.append((path, f"unreadable: {error.strerror}"))
                continue
            if fault := _fault(content):
                bad.append((path, fault))
            texts[domain].append(content)
    return texts, bad


def _fault(content: bytes) -> str:
    """Say why `content` is not text, or nothing."""
    if not content.strip():
        return "empty"
    if b"\0" in content:
        return "binary"
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start}"
    return ""


def _documents(texts: dict[str, list[bytes]]) -> dict[str, list[str]]:
    """Cut every domain's files into documents; a domain of one small file is cut finer, to have some to hold out."""
    documents = {}
    for domain, contents in texts.items():
        alone = len(contents) == 1 and len(contents[0]) < 32 * PIECE
        piece = max(len(contents[0]) // 32, 256) if alone else PIECE
        documents[domain] = [part.decode() for content in contents for part in cut(content, piece)]
    return documents


def _relative(file: Path, root: Path) -> str:
    """Return the name of `file` as seen from `root`."""
    return file.name if file == root else str(file.relative_to(root))
