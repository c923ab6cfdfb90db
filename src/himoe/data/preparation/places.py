"""Where a corpus goes, and what lies there already: itself, a part of it, or something that is in the way.

A folder of the cache is named by text and settings, so whatever lies there is of the same corpus and may be made again.
In a folder of somebody's own, what is of another corpus, or no corpus, is refused and left as it is.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from himoe.data.corpus import Corpus, UnusableCorpusError, describe, is_prepared, is_unfinished, open_corpus
from himoe.data.preparation.scan import Progress, Scan
from himoe.data.preparation.writing import PLAN, Settings, corpus_key
from himoe.errors import DataError

State = Literal["made", "begun", "free", "unread"]  # the last: made or begun if it is of this text, else in the way


def cache_place(store: Path, scan: Scan, settings: Settings) -> Path:
    """Return the folder of the cache that is for this corpus."""
    return store / "corpora" / corpus_key(scan, settings)[:32]


def open_cached(folder: Path, name: str, scan: Scan, settings: Settings, report: Progress) -> Corpus:
    """Open a folder of the cache; raises `DataError` unless it is whole and of this text and these settings."""
    if describe(folder)["key"] != corpus_key(scan, settings):
        raise UnusableCorpusError(folder, "holds a corpus of other text or settings")
    return open_corpus(folder, name=name, report=report)


def state_of(out: Path, scan: Scan | None, settings: Settings) -> State:
    """Say what a folder of somebody's own holds of this corpus, as far as is known without a scan.

    Raises `DataError` where anything else is in it.
    """
    if is_prepared(out):
        try:
            found = describe(out)
        except UnusableCorpusError as error:
            raise _in_the_way(out, error.fault) from error
        what, state, text = "a corpus", "made", scan and corpus_key(scan, settings)
    elif is_unfinished(out):
        found = _plan(out)
        what, state, text = "an unfinished corpus", "begun", scan and scan.fingerprint
    elif out.exists() and not all(entry.name.startswith(PLAN) for entry in out.iterdir()):
        raise DataError(f"{out}: not empty and no prepared corpus; nothing was changed: choose another folder")
    else:
        return "free"
    if found["settings"] != asdict(settings) or text not in (None, found["key"]):
        raise _in_the_way(out, f"holds {what} of other text or settings")
    return state if scan else "unread"


def open_own(out: Path, name: str, report: Progress) -> Corpus:
    """Open the corpus in a folder of somebody's own; raises `DataError` unless it is whole."""
    try:
        return open_corpus(out, name=name, report=report)
    except UnusableCorpusError as error:
        raise _in_the_way(out, error.fault) from error


def _plan(folder: Path) -> dict[str, Any]:
    """Return of what a folder holds a part: the text's fingerprint as `key`, and `settings`.

    How the text lies in units plays no part: in another layout, the same corpus begins anew.
    """
    try:
        plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except ValueError:
        plan = {}
    settings = {key: value for key, value in plan.items() if key not in ("format", "text", "layout")}
    return {"key": plan.get("text"), "settings": settings}


def _in_the_way(out: Path, fault: str) -> DataError:
    return DataError(f"{out}: {fault}; delete {out}, or choose another folder")
