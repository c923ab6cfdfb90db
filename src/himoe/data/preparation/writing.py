"""The second pass: from a scanned text to a finished folder of shards, unit by unit, resumable at each.

While it is under way the folder holds `preparation.json`, which says of what, and a record in `units/` of every unit
that is done; `corpus.json` is written last, so a folder is complete if and only if it has one. The files depend on the
text and the settings alone, never on the number of processes or on what interrupted the work.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from himoe.data.preparation.choice import Kept, split, training_sample
from himoe.data.preparation.pool import Advance, Pool
from himoe.data.preparation.scan import Progress, Scan, first_of_equal, read_unit, scanned_documents
from himoe.data.preparation.split import Split
from himoe.data.shards import ShardWriter, token_type
from himoe.data.text import Source, Unit
from himoe.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from himoe.files import sync_folder, write_json, write_text

FORMAT = 4  # to be raised when the same text would give other files than before
REPORTED = 2**20  # bytes between two reports
BATCH = 2**17  # characters encoded at a time, which takes up to some 300 bytes of memory for each
LONGEST = 2**18  # characters of a text that is encoded as one
PLAN, CORPUS, TOKENIZER = "preparation.json", "corpus.json", "tokenizer.json"
SIDES = ("train", "held_out")


@dataclass(frozen=True)
class Settings:
    """What decides, beside the text, which files come out."""

    tokenizer: str  # bpe, byte, or file
    tokenizer_hash: str | None  # of a file
    vocab_size: int | None  # of bpe
    library: str | None  # version that trains bpe: another one may learn other merges
    held_out: float
    minimum_held_out: int
    deduplicate: bool


@dataclass(frozen=True)
class Plan:
    """How every process treats a document."""

    folder: Path
    domains: list[str]
    split: Split
    tokenizer: str  # hash of the one in the folder


def build(
    folder: Path, source: Source, scan: Scan, settings: Settings, given: Tokenizer | None, pool: Pool, report: Progress
) -> None:
    """Fill `folder`, or what is missing in it, and write `corpus.json`.

    Raises `DataError` where the text has changed since it was scanned, and `OSError` where the disk is full; what was
    finished by then is found again.
    """
    _start(folder, {"format": FORMAT, "text": scan.fingerprint, "layout": scan.layout, **asdict(settings)})
    if settings.deduplicate:
        report("comparing documents", 0, 0)
    kept = first_of_equal(scan) if settings.deduplicate else [None] * len(scan.counts)
    sides = split(source.name, scan, kept, settings.held_out, settings.minimum_held_out)
    if not (folder / TOKENIZER).exists():
        tokenizer = given or _make_tokenizer(source, scan, kept, sides, settings, pool, report)
        write_text(folder / TOKENIZER, tokenizer.to_json())
    plan = Plan(folder, scan.domains, sides, load_tokenizer(folder / TOKENIZER).hash)
    _write_units(plan, source, scan, kept, pool, report)
    _finish(plan, source, settings, scan)


def clear(folder: Path) -> None:
    """Delete what a preparation writes, and nothing else; `corpus.json` first, so that nobody opens the rest."""
    (folder / CORPUS).unlink(missing_ok=True)
    shutil.rmtree(folder / "units", ignore_errors=True)
    for path in (*folder.glob("*.tokens"), *folder.glob("*.tmp"), folder / TOKENIZER, folder / "ngrams.json"):
        path.unlink(missing_ok=True)
    (folder / PLAN).unlink(missing_ok=True)  # last: it says that the rest may be deleted


def _start(folder: Path, plan: dict[str, Any]) -> None:
    """Make `folder` ready: empty, or with the finished part of the very same work."""
    try:
        same = json.loads((folder / PLAN).read_text(encoding="utf-8")) == plan
    except (OSError, ValueError):
        same = False
    if not same:
        clear(folder)
        write_json(folder / PLAN, plan)
    drop_partial_files(folder)
    (folder / "units").mkdir(exist_ok=True)


def _make_tokenizer(
    source: Source,
    scan: Scan,
    kept: Kept,
    sides: Split,
    settings: Settings,
    pool: Pool,
    report: Progress,
) -> Tokenizer:
    """Return the tokenizer that the settings ask for; BPE merges are learned from the training part only."""
    if settings.vocab_size is None:
        return ByteTokenizer()
    texts = training_sample(source, scan, kept, sides, pool, report)
    report("learning the tokenizer", 0, 0)
    return BPETokenizer.train(texts, settings.vocab_size)


def _write_units(plan: Plan, source: Source, scan: Scan, kept: Kept, pool: Pool, report: Progress) -> None:
    """Write the shards of all units that have none yet; those that an interrupted run left are checked first."""
    done, stage = 0, "checking what is there"

    def advance(size: int) -> None:
        nonlocal done
        done += size
        report(stage, done, scan.num_bytes)

    units = range(len(scan.counts))
    left = [(plan.folder, index) for index in units if (plan.folder / _record(index)).exists()]
    whole = {index for index in pool.run(check_unit, left, advance) if index is not None}
    missing = [index for index in units if index not in whole]
    done, stage = scan.num_bytes - sum(int(scan.unit(index).sizes.sum()) for index in missing), "writing tokens"
    advance(0)
    tasks = ((plan, index, source.units[index], scan.folder, kept[index]) for index in missing)
    for _ in pool.run(write_unit, tasks, advance):
        pass


def write_unit(plan: Plan, index: int, unit: Unit, scans: Path, kept: np.ndarray | None, advance: Advance) -> None:
    """Write the shards of one unit and, when they are safe on disk, its record."""
    tokenizer = _tokenizer(plan.folder / TOKENIZER, plan.tokenizer)
    known, names = read_unit(scans, index)
    held_out = plan.split.is_held_out(known.digests)
    removed = {name: [0, 0] for name in names}
    texts = scanned_documents(scans, index, unit)
    with ShardWriter(plan.folder, token_type(tokenizer.vocab_size)) as writer:

        def documents() -> Iterator[tuple[str, str, int]]:
            for place, (domain, text) in enumerate(texts):
                if kept is not None and not kept[place]:
                    removed[domain][0] += 1
                    removed[domain][1] += int(known.sizes[place])
                    continue
                side = SIDES[int(held_out[place])]
                yield f"{side}-{plan.domains.index(domain):03}-{index:06}.tokens", text, int(known.sizes[place])

        unreported = 0
        for batch in _batches(documents()):
            _encode(batch, tokenizer, writer)
            if (unreported := unreported + sum(piece.size for piece in batch)) >= REPORTED:
                advance(unreported)
                unreported = 0
        advance(unreported + sum(size for _, size in removed.values()))
        record = {"shards": writer.finish(), "duplicates": removed}
    sync_folder(plan.folder)
    write_json(plan.folder / _record(index), record)


@dataclass(frozen=True)
class Piece:
    """Text that is encoded as one: a document, or a part of one that is very long."""

    shard: str
    text: str
    size: int  # bytes of the whole document, counted at its last piece
    ends: bool  # a document


def _batches(documents: Iterable[tuple[str, str, int]]) -> Iterator[list[Piece]]:
    """Put documents, given as shard, text and size, into batches of about `BATCH` characters."""
    batch, length = [], 0
    for shard, text, size in documents:
        for part, ends in _cut(text):
            batch.append(Piece(shard, part, size if ends else 0, ends))
            length += len(part)
            if length >= BATCH:
                yield batch
                batch, length = [], 0
    if batch:
        yield batch


def _cut(text: str) -> Iterator[tuple[str, bool]]:
    """Cut a text of more than `LONGEST` characters at line ends, since encoding takes many times its memory."""
    start = 0
    while len(text) - start > LONGEST:
        end = text.rfind("\n", start, start + LONGEST) + 1 or start + LONGEST
        yield text[start:end], False
        start = end
    yield text[start:], True


def _encode(batch: Sequence[Piece], tokenizer: Tokenizer, writer: ShardWriter) -> None:
    """Encode a batch and hand it to the writer, each document with its end."""
    for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
        writer.add(piece.shard, ids, num_bytes=piece.size, num_documents=int(piece.ends))
        if piece.ends:
            writer.add(piece.shard, [tokenizer.end_of_document], num_bytes=0, num_documents=0)


@functools.lru_cache(maxsize=1)
def _tokenizer(path: Path, hash: str) -> Tokenizer:  # noqa: ARG001
    """Return the tokenizer of a folder; the hash tells it from one that lay there before."""
    return load_tokenizer(path)


def _record(index: int) -> str:
    return f"units/{index:06}.json"


def check_unit(folder: Path, index: int, advance: Advance) -> int | None:
    """Return the index of a unit whose shards are what its record says, else None."""
    try:
        shards = json.loads((folder / _record(index)).read_text(encoding="utf-8"))["shards"]
        for shard in shards:
            with (folder / shard["file"]).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                    return None
            advance(shard["bytes"])
    except (OSError, ValueError, KeyError):
        return None
    return index


def _finish(plan: Plan, source: Source, settings: Settings, scan: Scan) -> None:
    """Write `corpus.json` from the units' records, and drop what only an unfinished folder needs."""
    tokenizer = load_tokenizer(plan.folder / TOKENIZER)
    domains: dict[str, Any] = {
        name: {side: {"documents": 0, "bytes": 0, "tokens": 0, "shards": []} for side in SIDES}
        | {"duplicates": {"documents": 0, "bytes": 0}}
        for name in plan.domains
    }
    for index in range(len(scan.counts)):
        record = json.loads((plan.folder / _record(index)).read_text(encoding="utf-8"))
        for shard in record["shards"]:
            side, place, _ = shard["file"].split("-")
            part = domains[plan.domains[int(place)]][side]
            for count in ("documents", "bytes", "tokens"):
                part[count] += shard[count]
            part["shards"].append({key: shard[key] for key in ("file", "tokens", "sha256")})
        for name, (documents, size) in record["duplicates"].items():
            domains[name]["duplicates"]["documents"] += documents
            domains[name]["duplicates"]["bytes"] += size
    description = {
        "himoe_corpus": FORMAT,
        "name": source.name,
        "key": corpus_key(scan, settings),
        "settings": asdict(settings),
        "tokenizer": tokenizer.hash,
        "dtype": token_type(tokenizer.vocab_size).str,
        "end_of_document": tokenizer.end_of_document,
        "domains": domains,
    }
    write_json(plan.folder / CORPUS, {**description, "sha256": description_hash(description)})
    sync_folder(plan.folder)
    drop_leftovers(plan.folder)


def drop_leftovers(folder: Path) -> None:
    """Delete what a finished folder no longer needs."""
    shutil.rmtree(folder / "units", ignore_errors=True)
    drop_partial_files(folder)
    (folder / PLAN).unlink(missing_ok=True)


def drop_partial_files(folder: Path) -> None:
    """Delete what killed processes were writing: another process may get the number that is in the name."""
    for partial in folder.glob("*.tmp"):
        partial.unlink(missing_ok=True)


def description_hash(description: dict[str, Any]) -> str:
    """Return the hex hash that `corpus.json` holds of the rest of itself."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def corpus_key(scan: Scan, settings: Settings) -> str:
    """Return the hex hash of everything that decides the tokens of a corpus."""
    return hashlib.sha256(json.dumps([FORMAT, scan.fingerprint, asdict(settings)]).encode()).hexdigest()
