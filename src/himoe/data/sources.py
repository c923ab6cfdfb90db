"""Text files and folders, read as documents per domain.

A file is one domain, named by its stem. In a folder every first-level sub-folder or file is a domain. Hidden entries
are skipped, every other regular file must be UTF-8 text. One file is one document; a big file is cut at blank lines, so
that a domain that is one long file still has documents to hold out.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from himoe.errors import DataError

PIECE = 16 * 1024  # bytes; a file of more than four of these is cut into documents of one to four
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
    try:
        files = _domains(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; give a UTF-8 text file or a folder") from error
    texts, bad = _read(files)
    if bad:
        total = sum(map(len, files.values()))
        shown = ", ".join(f"{_relative(file, path)} ({reason})" for file, reason in bad[:NAMED])
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise DataError(f"{path}: {len(bad)} of {total} files cannot be used: {shown}{more}; "
                        "data must be UTF-8 text, take other files out or hide them with a leading dot")  # fmt: skip
    return Source(path.resolve().name, fingerprint(texts), partial(_documents, texts))


def fingerprint(texts: Mapping[str, Sequence[str]]) -> str:
    """Return the hex hash of every domain's name and texts, in their order."""
    digest = hashlib.sha256()
    for domain, contents in texts.items():
        hashes = [hashlib.sha256(content.encode()).hexdigest() for content in contents]
        digest.update(repr((domain, hashes)).encode())
    return digest.hexdigest()


def cut(text: str, piece: int = PIECE) -> list[str]:
    r"""Cut a text longer than `4 * piece` bytes at the first blank line, else line end, after each `piece` bytes.

    Pieces have `piece` to about `4 * piece` bytes, the last one perhaps fewer, and joined they are the text again.

    >>> cut("one\n\ntwo\nthree\n", 3)
    ['one\n\n', 'two\n', 'three\n']
    """
    content = text.encode()
    if len(content) <= 4 * piece:
        return [text]
    pieces, start = [], 0
    while len(content) - start > 2 * piece:
        low, high = start + piece, min(start + 4 * piece, len(content))
        end = next(
            (at + len(mark) for mark in (b"\n\n", b"\n") if (at := content.find(mark, low - 1, high)) >= 0), high
        )
        while end < len(content) and content[end] & 0xC0 == 0x80:  # never inside a character
            end += 1
        pieces.append(content[start:end].decode())
        start = end
    return [*pieces, content[start:].decode()] if start < len(content) else pieces


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


def _read(files: dict[str, list[Path]]) -> tuple[dict[str, list[str]], list[tuple[Path, str]]]:
    """Return the text of every domain's files, and the files that are not text with the reason."""
    texts: dict[str, list[str]] = {domain: [] for domain in files}
    bad = []
    for domain, paths in files.items():
        for path in paths:
            try:
                text = path.read_bytes().decode()
            except OSError as error:
                bad.append((path, f"unreadable: {error.strerror}"))
            except UnicodeDecodeError as error:
                bad.append((path, "binary" if b"\0" in error.object else f"not UTF-8 at byte {error.start}"))
            else:
                if "\0" in text or not text.strip():
                    bad.append((path, "empty" if not text.strip() else "binary"))
                texts[domain].append(text)
    return texts, bad


def _documents(texts: dict[str, list[str]]) -> dict[str, list[str]]:
    """Cut every domain's files into documents; a domain of one small file is cut finer, to have some to hold out."""
    documents = {}
    for domain, contents in texts.items():
        alone = len(contents) == 1 and len(contents[0]) < 32 * PIECE
        piece = max(len(contents[0]) // 32, 256) if alone else PIECE
        documents[domain] = [part for content in contents for part in cut(content, piece)]
    return documents


def _relative(file: Path, root: Path) -> str:
    """Return the name of `file` as seen from `root`."""
    return file.name if file == root else str(file.relative_to(root))
