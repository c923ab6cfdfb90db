"""From text to a prepared corpus: made once, then found again in the cache, or in the folder it was written to.

The cache lies under `$HIMOE_CACHE`, else `$XDG_CACHE_HOME/himoe`, else `~/.cache/himoe`, one folder per content: the
same text with the same settings is found again wherever it lies, and changed text is prepared anew. All of it may be
deleted at any time.
"""

import contextlib
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import tokenizers

from himoe.data.corpus import Corpus, cache_folder, is_prepared, is_unfinished, open_corpus
from himoe.data.preparation.places import State, cache_place, open_cached, open_own, state_of
from himoe.data.preparation.pool import Pool, available_cores
from himoe.data.preparation.scan import Progress, Scan, TextChangedError, known_scan, scan_folder, scan_source
from himoe.data.preparation.writing import Settings, build, clear
from himoe.data.text import Source, embedded_source, read_source, read_sources
from himoe.data.tokenizer import Tokenizer, load_tokenizer
from himoe.errors import ConfigError, DataError, HimoeWarning

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ONCE = "once-"  # begins the name of a scan that is used for one preparation only
FORGOTTEN = 7 * 24 * 3600  # seconds after which unfinished work that nobody went on with is deleted


def prepare(
    path: Path | None = None,
    *,
    sources: Mapping[str, Path] | None = None,
    text_column: str = "text",
    domain_column: str | None = None,
    tokenizer: str | Path = "bpe",
    vocab_size: int = 4096,
    held_out: float = 0.05,
    deduplicate: bool = False,
    workers: int | None = None,
    out: Path | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Return the corpus of a text, prepared now or before.

    The arguments are the keys of `[data]` in a configuration, and their meaning is the one described there; `path` may
    be a folder written with `out`, which is opened as it is, and None is the text that every Python has.

    `out` is a folder to write instead of one in the cache; if it holds anything else, it is refused and left alone.
    `cache` replaces the cache folder that the environment names, and `progress` is told what is being done, bytes done
    and bytes in all, 0 where that is not known; it may be called by another thread. Raises `DataError` for text, or a
    folder, that cannot be used. What was finished before an interruption is kept, and the same call goes on there.
    """
    report = progress or (lambda _stage, _done, _total: None)
    given = _given_tokenizer(tokenizer)
    if path is not None and is_prepared(Path(path)):
        if out is not None:
            raise ConfigError(f"{path}: prepared already, and opened as it is; leave `out` away, or copy it to {out}")
        return _open_as_it_is(Path(path), str(tokenizer), given, report)
    report("reading", 0, 0)
    source = find_source(path, sources, text_column=text_column, domain_column=domain_column)
    settings = _settings(source, str(tokenizer), given, vocab_size, held_out, deduplicate)
    store = Path(cache) if cache else cache_folder()
    try:
        return _prepare(source, settings, given, store, Path(out) if out else None, workers, report)
    except OSError as error:
        raise _explained(error, [store, Path(out)] if out else [store]) from error


def find_source(
    path: Path | None = None,
    sources: Mapping[str, Path] | None = None,
    *,
    text_column: str = "text",
    domain_column: str | None = None,
) -> Source:
    """Return the text that `prepare` would read; raises `DataError` where there is none, `ConfigError` for a clash."""
    if sources is not None:
        if path is not None or domain_column is not None:
            other = "data.path" if path is not None else "data.domain_column"
            raise ConfigError(f"data.sources names paths and domains; leave {other} out, or data.sources")
        return read_sources({name: Path(one) for name, one in sources.items()}, text_column=text_column)
    if path is None:
        return embedded_source()
    if is_unfinished(Path(path)):
        raise DataError(f"{path}: its preparation was not finished; start `himoe prepare … --out {path}` once more")
    return read_source(Path(path), text_column=text_column, domain_column=domain_column)


def find_prepared(
    source: Source,
    *,
    tokenizer: str | Path = "bpe",
    vocab_size: int = 4096,
    held_out: float = 0.05,
    deduplicate: bool = False,
    out: Path | None = None,
    cache: Path | None = None,
) -> tuple[Path | None, State]:
    """Return the folder that `prepare` would write or open, None for one not known yet, and what lies in it.

    No text is read for it. Raises `DataError` where `prepare` would refuse `out`.
    """
    given = _given_tokenizer(tokenizer)
    settings = _settings(source, str(tokenizer), given, vocab_size, held_out, deduplicate)
    store = Path(cache) if cache else cache_folder()
    scan = known_scan(scan_folder(source, store))
    if out is not None:
        return Path(out), state_of(Path(out), scan, settings)
    if scan is None:
        return None, "unread"
    folder = cache_place(store, scan, settings)
    return folder, "made" if is_prepared(folder) else "begun" if is_unfinished(folder) else "free"


def _given_tokenizer(tokenizer: str | Path) -> Tokenizer | None:
    """Return the tokenizer that a path names; None for one that is made here."""
    if tokenizer in ("bpe", "byte"):
        return None
    if not Path(tokenizer).exists():
        raise ConfigError(f"data.tokenizer is {str(tokenizer)!r}; it must be 'bpe', 'byte', or the path of a tokenizer")
    return load_tokenizer(Path(tokenizer))


def _settings(
    source: Source, tokenizer: str, given: Tokenizer | None, vocab_size: int, held_out: float, deduplicate: bool
) -> Settings:
    """Return what decides the files; `given` is the tokenizer of a path."""
    return Settings(
        tokenizer="file" if given else tokenizer,
        tokenizer_hash=given and given.hash,
        vocab_size=vocab_size if tokenizer == "bpe" else None,
        library=tokenizers.__version__ if tokenizer == "bpe" else None,
        held_out=held_out,
        minimum_held_out=source.minimum_held_out,
        deduplicate=deduplicate,
    )


def _prepare(
    source: Source,
    settings: Settings,
    given: Tokenizer | None,
    store: Path,
    out: Path | None,
    workers: int | None,
    report: Progress,
) -> Corpus:
    """Find the corpus by what is known of the text, else read it, else make it."""
    kept = scan_folder(source, store)
    if (scan := known_scan(kept)) and (corpus := _found(source, scan, settings, store, out, report)):
        return corpus
    with contextlib.ExitStack() as stack:
        if kept is None:  # nothing tells whether the text has changed, so it is read each time
            (store / "scans").mkdir(parents=True, exist_ok=True)
            kept = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=store / "scans", prefix=ONCE)))
        pool = stack.enter_context(Pool(min(workers or available_cores(), len(source.units))))
        with _lock(kept, report):
            scan = scan_source(source, kept, pool, report)
        if corpus := _found(source, scan, settings, store, out, report):
            return corpus
        folder = out or cache_place(store, scan, settings)
        stack.enter_context(_lock(folder, report))
        if out:  # another process may have written to it in the meantime
            if corpus := _found(source, scan, settings, store, out, report):
                return corpus
        elif is_prepared(folder):  # likewise, or it is damaged
            try:
                return open_cached(folder, source.name, scan, settings, report)
            except DataError as error:
                warnings.warn(f"{error}: that is done now", HimoeWarning, stacklevel=3)
                clear(folder)
        _forget_old_work(store, but=(folder, kept))
        try:
            build(folder, source, scan, settings, given, pool, report)
        except TextChangedError:
            shutil.rmtree(kept, ignore_errors=True)
            if out:
                clear(out)  # else it would be in the way of the new text
            raise
    return open_corpus(folder, name=source.name, report=report, just_written=True)


def _found(
    source: Source, scan: Scan, settings: Settings, store: Path, out: Path | None, report: Progress
) -> Corpus | None:
    """Open the corpus if it has been made and, in the cache, is whole; raises `DataError` where `out` is in the way."""
    if out is not None:
        return open_own(out, source.name, report) if state_of(out, scan, settings) == "made" else None
    folder = cache_place(store, scan, settings)
    with contextlib.suppress(DataError):
        return open_cached(folder, source.name, scan, settings, report) if is_prepared(folder) else None
    return None


def _open_as_it_is(folder: Path, tokenizer: str, given: Tokenizer | None, report: Progress) -> Corpus:
    """Open a prepared folder, unless another tokenizer is asked for than the default or its own."""
    corpus = open_corpus(folder, report=report)
    if (given is not None and given.hash != corpus.tokenizer.hash) or (
        tokenizer == "byte" and corpus.tokenizer.name != "byte"
    ):
        raise ConfigError(
            f"data.tokenizer is {tokenizer!r}, but {folder} was prepared with another one ({corpus.tokenizer.name}); "
            "set it to bpe, which takes whichever the folder has, or prepare the text itself once more"
        )
    return corpus


@contextlib.contextmanager
def _lock(folder: Path, report: Progress) -> Iterator[None]:
    """Keep other processes from writing to `folder`; waits for one that does so now.

    The lock is the system's and ends with the process. Where there are none, two processes do the same work twice, and
    both come to the same files.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            yield
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report("waiting for another process that prepares the same text", 0, 0)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError:  # a disk that knows no locks, such as some network drives
                pass
            if _is_open_as(descriptor, folder):
                os.utime(folder)
                yield
                return
        finally:
            os.close(descriptor)


def _is_open_as(descriptor: int, folder: Path) -> bool:
    """Say whether a folder is still the one that was opened, and not deleted, or made anew, since then."""
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False


def _forget_old_work(store: Path, but: Sequence[Path]) -> None:
    """Delete what unfinished preparations left in the cache long ago, and the digests of texts not used for long."""
    before = time.time() - FORGOTTEN
    for folder in (store / "corpora").glob("*/"):
        if folder not in but and is_unfinished(folder) and _changed(folder) < before:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in (store / "scans").glob("*/"):
        if folder not in but and _changed(folder) < before:
            for unit in folder.glob("*.npz"):
                unit.unlink(missing_ok=True)
            if folder.name.startswith(ONCE):
                shutil.rmtree(folder, ignore_errors=True)


def _changed(folder: Path) -> float:
    """Return when a folder was last changed; now, where another process has just deleted it."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def _explained(error: OSError, written: Sequence[Path]) -> DataError:
    """Return what the system refused, told apart by whether the file lies in a folder that is written to."""
    place = Path(os.fsdecode(error.filename)).resolve() if isinstance(error.filename, str | bytes) else None
    around = [folder for folder in written if place is None or place.is_relative_to(folder.resolve())]
    if not around:
        return DataError(f"{place}: cannot be read: {error.strerror}; mend that, or take it out of the text")
    return DataError(
        f"{around[-1]}: cannot keep the prepared data there: {error.strerror or error}; free some space and run the "
        "same again, finished parts are kept; or let HIMOE_CACHE (or --out) name another folder"
    )
