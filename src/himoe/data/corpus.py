"""From text to a prepared corpus on disk: split, tokenizer, token files; made once, then opened from the cache.

The cache lies under `$HIMOE_CACHE`, else `$XDG_CACHE_HOME/himoe`, else `~/.cache/himoe`, one folder per content: the
same text with the same settings is found again wherever it lies, and changed text is prepared anew. A folder appears
only when it is complete, a damaged one is made again, and all of it may be deleted at any time.
"""

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import tokenizers

from himoe.data.embedded import embedded_source
from himoe.data.sources import Source, read_source
from himoe.data.split import digest, split_documents
from himoe.data.shards import TokenFile, TokenStream
from himoe.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from himoe.errors import ConfigError, DataError

FORMAT = 2  # to be raised when the same text would give other files than before
BPE_SAMPLE = 16 * 2**20  # bytes of training text that the merges are learned from
BATCH = 4 * 2**20  # bytes of text encoded at a time

Progress = Callable[[str, float], None]  # what is being done, and how much of it, 0 … 1


@dataclass(frozen=True)
class Preparation:
    """How text becomes a corpus, checked."""

    tokenizer: str
    vocab_size: int
    held_out: float

    def __post_init__(self) -> None:
        if self.tokenizer not in ("bpe", "byte"):
            raise ConfigError(f"data.tokenizer is {self.tokenizer!r}; allowed are 'bpe' and 'byte'")


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


def prepare(
    path: Path | None = None,
    *,
    tokenizer: str = "bpe",
    vocab_size: int = 4096,
    held_out: float = 0.05,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Return the corpus of a text file or folder, or of the text every Python has where `path` is None.

    `held_out` is the fraction of documents kept from training, `vocab_size` counts only for `tokenizer="bpe"`,
    `cache` replaces the folder that the environment names.
    Raises `DataError` for text or a cache folder that cannot be used.
    """
    report = progress or (lambda _stage, _done: None)
    report("read", 0.0)
    source = embedded_source() if path is None else read_source(Path(path))
    how = Preparation(tokenizer, vocab_size if tokenizer == "bpe" else 0, held_out)
    folder = (Path(cache) if cache else cache_folder()) / "corpora" / _key(source, how)[:32]
    with contextlib.suppress(DataError):
        return _open(folder, source, how)
    parts = {
        domain: split_documents(
            documents, held_out, minimum_bytes=source.minimum_held_out, where=f"{source.name}, domain {domain}"
        )
        for domain, documents in source.load().items()
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as partial:
            _build(Path(partial, "corpus"), parts, how, report)
            _publish(Path(partial, "corpus"), folder, lambda: _open(folder, source, how))
        return _open(folder, source, how)
    except OSError as error:
        raise DataError(
            f"{folder.parent}: cannot keep the prepared data there: {error.strerror or error}; "
            "free some space, or let the variable HIMOE_CACHE name another folder"
        ) from error


def cache_folder() -> Path:
    """Return where prepared data is kept: `$HIMOE_CACHE`, `$XDG_CACHE_HOME/himoe` or `~/.cache/himoe`."""
    if named := os.environ.get("HIMOE_CACHE"):
        return Path(named).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "himoe"
    except RuntimeError as error:  # no home folder
        raise DataError("there is no home folder to keep prepared data in; set the variable HIMOE_CACHE") from error


def _key(source: Source, how: Preparation) -> str:
    """Return the hex hash of everything that decides the files of a corpus."""
    library = tokenizers.__version__ if how.tokenizer == "bpe" else None  # another one may learn other merges
    decisive = [FORMAT, source.fingerprint, source.minimum_held_out, *astuple(how), library]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def _open(folder: Path, source: Source, how: Preparation) -> Corpus:
    """Open a prepared folder; raises `DataError` unless every file is there and undamaged."""
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    try:
        meta = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        domains, expected = list(meta["domains"]), meta["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: not a prepared corpus: {error}") from error
    if tokenizer.hash != expected:
        raise DataError(f"{folder}: tokenizer.json differs from its recorded hash")
    return Corpus(
        name=source.name,
        hash=hashlib.sha256((_key(source, how) + tokenizer.hash).encode()).hexdigest(),
        tokenizer=tokenizer,
        domains=domains,
        train={domain: _stream(folder / f"train_{i}.tokens") for i, domain in enumerate(domains)},
        held_out={domain: _stream(folder / f"held_out_{i}.tokens") for i, domain in enumerate(domains)},
        folder=folder,
    )


def _build(folder: Path, parts: dict[str, tuple[list[str], list[str]]], how: Preparation, report: Progress) -> None:
    """Write tokenizer, token files and `corpus.json` of split documents into a new folder."""
    folder.mkdir()
    report("tokenizer", 0.0)
    tokenizer = _train_tokenizer([train for train, _ in parts.values()], how)
    tokenizer.save(folder / "tokenizer.json")
    files = {f"train_{i}": train for i, (train, _) in enumerate(parts.values())}
    files |= {f"held_out_{i}": held_out for i, (_, held_out) in enumerate(parts.values())}
    total = sum(len(document) for documents in files.values() for document in documents)
    done = 0
    for name, documents in files.items():

        def batches(documents: list[str] = documents) -> Iterator[list[str]]:
            nonlocal done
            for batch in _batches(documents):
                report("encode", done / total)
                yield batch
                done += sum(map(len, batch))

        _write(folder / f"{name}.tokens", batches(), tokenizer)
    meta = {"domains": list(parts), "tokenizer": tokenizer.hash}
    (folder / "corpus.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _train_tokenizer(domains: list[list[str]], how: Preparation) -> Tokenizer:
    """Learn BPE merges from the training part only: an equal share of `BPE_SAMPLE` per domain, lowest hashes first.

    Equal shares, because in proportion to size a small domain would get no tokens of its own.
    """
    if how.tokenizer == "byte":
        return ByteTokenizer()
    sample = []
    for documents in domains:
        left = BPE_SAMPLE // len(domains)
        for document in sorted(documents, key=digest):
            if left <= 0:
                break
            sample.append(document)
            left -= len(document.encode())
    return BPETokenizer.train(sample, how.vocab_size)


def _batches(documents: list[str]) -> Iterator[list[str]]:
    """Yield documents in batches of about `BATCH` characters."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _publish(built: Path, folder: Path, check: Callable[[], object]) -> None:
    """Move a complete folder to its name, unless another process was quicker; a damaged one there makes way.

    `check` raises DataError where `folder` is damaged.
    """
    try:
        built.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        try:
            check()
        except DataError:
            folder.rename(built.with_name("damaged"))  # goes with the temporary folder
            built.rename(folder)


def _stream(path: Path) -> TokenStream:
    """Open one token file."""
    try:
        meta = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        file = TokenFile(path, np.dtype(meta["dtype"]), meta["num_tokens"])
        if hashlib.sha256(path.read_bytes()).hexdigest() != meta["sha256"]:
            raise DataError(f"{path}: content differs from its recorded hash; prepare the data again")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a readable token file: {error}; prepare the data again") from error
    return TokenStream([file], end_of_document=meta["end_of_document"], num_bytes=meta["num_bytes"],
                       num_documents=meta["num_documents"])


def _write(path: Path, batches: Iterable[list[str]], tokenizer: Tokenizer) -> None:
    """Encode batches of documents and write them under a temporary name, renamed when complete."""
    path = Path(path)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    digest_, num_tokens, num_bytes, num_documents = hashlib.sha256(), 0, 0, 0
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        for batch in batches:
            num_bytes += sum(len(document.encode()) for document in batch)
            for ids in tokenizer.encode_batch(batch):
                content = np.array([*ids, tokenizer.end_of_document], dtype=dtype).tobytes()
                digest_.update(content)
                file.write(content)
                num_tokens += len(ids) + 1
                num_documents += 1
    meta = {
        "format": 1,
        "dtype": dtype.str,
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
        "num_documents": num_documents,
        "end_of_document": tokenizer.end_of_document,
        "sha256": digest_.hexdigest(),
    }
    path.with_suffix(".json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    partial.replace(path)
