"""A prepared corpus on disk, opened: its tokenizer, and the tokens of every domain.

The folder is described by its `corpus.json` and can be moved. Sizes are checked whenever it is opened. Hashes are
checked too where that is quick; of a large folder once, and again when a file's size or time changes.
"""

import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from himoe.data.preparation.scan import Progress
from himoe.data.preparation.writing import CORPUS, FORMAT, PLAN, SIDES, TOKENIZER, description_hash, drop_leftovers
from himoe.data.shards import TokenFile, TokenStream
from himoe.data.tokenizer import Tokenizer, load_tokenizer
from himoe.errors import DataError
from himoe.files import write_text

MARK = '"himoe_corpus"'  # stands at the beginning of every corpus.json of ours, and in no text by chance
QUICK = 64 * 2**20  # bytes of shards whose hashes are checked every time
NAMED = 5  # damaged files named in an error


class UnusableCorpusError(DataError):
    """A prepared folder that is damaged or of another version; `fault` says what is wrong with it."""

    def __init__(self, folder: Path, fault: str) -> None:
        super().__init__(f"{folder}: {fault}; prepare the data again")
        self.fault = fault


@dataclass(frozen=True)
class Corpus:
    """Text ready to train on: the training and the held-out tokens of every domain."""

    name: str
    hash: str  # over domain names, texts, tokenizer and split
    tokenizer: Tokenizer
    domains: list[str]
    train: dict[str, TokenStream]
    held_out: dict[str, TokenStream]
    folder: Path


def cache_folder() -> Path:
    """Return where prepared data is kept: `$HIMOE_CACHE`, `$XDG_CACHE_HOME/himoe` or `~/.cache/himoe`."""
    if named := os.environ.get("HIMOE_CACHE"):
        return Path(named).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "himoe"
    except RuntimeError as error:  # no home folder
        raise DataError("there is no home folder to keep prepared data in; set the variable HIMOE_CACHE") from error


def is_prepared(path: Path) -> bool:
    """Return whether a folder holds a prepared corpus, whole or damaged."""
    return _holds(path / CORPUS, MARK)


def is_unfinished(path: Path) -> bool:
    """Return whether a folder holds a preparation that has not been finished."""
    return _holds(path / PLAN, '"layout"') and not is_prepared(path)


def _holds(file: Path, mark: str) -> bool:
    """Return whether a file is there and has a mark near its beginning, so that it is one of ours."""
    try:
        with file.open(encoding="utf-8", errors="replace") as opened:
            return mark in opened.read(200)
    except OSError:
        return False


def describe(folder: Path) -> dict[str, Any]:
    """Return the content of `corpus.json`; raises `UnusableCorpusError` where that cannot be read."""
    try:
        found = json.loads((folder / CORPUS).read_text(encoding="utf-8"))
        version, expected = found["himoe_corpus"], found.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnusableCorpusError(folder, f"{CORPUS} is damaged ({error})") from error
    if version != FORMAT:
        raise UnusableCorpusError(folder, f"prepared in format {version}, this version reads {FORMAT}")
    if description_hash(found) != expected:
        raise UnusableCorpusError(folder, f"{CORPUS} differs from its recorded hash")
    return found


def open_corpus(
    folder: Path, *, name: str | None = None, report: Progress | None = None, just_written: bool = False
) -> Corpus:
    """Open a prepared folder, under another name if one is given; hashes of one just written need no check.

    Raises `UnusableCorpusError` naming what is missing or damaged in it.
    """
    description = describe(folder)
    tokenizer = _tokenizer(folder, description)
    check_shards(folder, description, hashes="none" if just_written else "unless known", report=report)
    if (folder / PLAN).exists():  # killed between its last two steps
        with contextlib.suppress(OSError):
            drop_leftovers(folder)
    train, held_out = (
        {domain: _stream(folder, description, parts[side]) for domain, parts in description["domains"].items()}
        for side in SIDES
    )
    identity = hashlib.sha256((description["key"] + tokenizer.hash).encode()).hexdigest()
    return Corpus(name or description["name"], identity, tokenizer, list(train), train, held_out, folder)


def verify(folder: Path, report: Progress | None = None) -> tuple[int, int]:
    """Check every byte of a prepared folder; return how many shards it has and their bytes, or raise `DataError`."""
    description = describe(folder)
    _tokenizer(folder, description)
    return check_shards(folder, description, hashes="all", report=report)


def _tokenizer(folder: Path, description: dict[str, Any]) -> Tokenizer:
    try:
        tokenizer = load_tokenizer(folder / TOKENIZER)
    except DataError:
        tokenizer = None
    if tokenizer is None or tokenizer.hash != description["tokenizer"]:
        raise UnusableCorpusError(folder, f"{TOKENIZER} is missing or damaged")
    return tokenizer


def check_shards(
    folder: Path,
    description: dict[str, Any],
    *,
    hashes: Literal["all", "unless known", "none"],
    report: Progress | None = None,
) -> tuple[int, int]:
    """Check the sizes and, as `hashes` says, the contents of all shards; return their number and bytes.

    Raises `UnusableCorpusError` naming the damaged shards.
    """
    width = np.dtype(description["dtype"]).itemsize
    shards = [shard for parts in description["domains"].values() for side in SIDES for shard in parts[side]["shards"]]
    bad, times, total = [], hashlib.sha256(), 0
    for shard in shards:
        try:
            stat = (folder / shard["file"]).stat()
        except OSError as error:
            bad.append(f"{shard['file']} ({error.strerror})")
            continue
        if stat.st_size != shard["tokens"] * width:
            bad.append(f"{shard['file']} ({stat.st_size} bytes, expected {shard['tokens'] * width})")
        state = shard["file"], shard["sha256"], stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
        times.update(repr(state).encode())
        total += stat.st_size
    known = total > QUICK and _remembered(folder) == times.hexdigest()
    if not bad and (hashes == "all" or (hashes == "unless known" and not known)):
        bad = _differing(folder, shards, total, report)
    if bad:
        with contextlib.suppress(OSError, DataError):
            _memory(folder).unlink(missing_ok=True)
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise UnusableCorpusError(folder, f"damaged: {', '.join(bad[:NAMED])}{more}")
    if total > QUICK and not known:
        _remember(folder, times.hexdigest())
    return len(shards), total


def _differing(folder: Path, shards: list[dict[str, Any]], total: int, report: Progress | None) -> list[str]:
    """Return the shards whose content is not what was written."""
    done, bad = 0, []

    def content(shard: dict[str, Any]) -> tuple[str, int]:
        with (folder / shard["file"]).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()

    with ThreadPoolExecutor() as threads:
        for shard, (found, size) in zip(shards, threads.map(content, shards), strict=True):
            done += size
            if report and total > QUICK:
                report("checking", done, total)
            if found != shard["sha256"]:
                bad.append(f"{shard['file']} (content differs from its recorded hash)")
    return bad


def _stream(folder: Path, description: dict[str, Any], part: dict[str, Any]) -> TokenStream:
    dtype = np.dtype(description["dtype"])
    return TokenStream(
        [TokenFile(folder / shard["file"], dtype, shard["tokens"]) for shard in part["shards"]],
        end_of_document=description["end_of_document"],
        num_bytes=part["bytes"],
        num_documents=part["documents"],
    )


def _remembered(folder: Path) -> str | None:
    """Return which state of the folder was found right."""
    try:
        return _memory(folder).read_text(encoding="utf-8")
    except (OSError, DataError):
        return None


def _remember(folder: Path, state: str) -> None:
    """Note that the folder is right in this state, if a cache can be written."""
    with contextlib.suppress(OSError, DataError):
        _memory(folder).parent.mkdir(parents=True, exist_ok=True)
        write_text(_memory(folder), state)


def _memory(folder: Path) -> Path:
    return cache_folder() / "verified" / hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
