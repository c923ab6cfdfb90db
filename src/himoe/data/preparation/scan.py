"""The first pass over a text: size and content hash of every document, kept so that the same files are read once.

From these follow the identity of the text, what is held out, which documents repeat another, and which the tokenizer
learns from. A scan is found again by the signature of its source: unchanged files need not be read to know them.
"""

import hashlib
import json
import os
import time
import zipfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from himoe.data.preparation.pool import Advance, Pool
from himoe.data.preparation.split import DIGEST, digest
from himoe.data.text import Source, Unit
from himoe.errors import DataError
from himoe.files import replacing, write_json

FORMAT = 1
SUMMARY = "scan.json"
MAX_DOMAINS = 1000
SETTLED = 2 * 10**9  # ns after which a change shows in a file's time: the coarsest file systems count 2 s
COMPARED = 2 * 2**20  # documents compared with each other at a time
CHANGED = "changed while the text was being prepared; run the same command again"

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all (0: not known)


class TextChangedError(DataError):
    """Text that is no longer what it was when it was scanned."""


@dataclass(frozen=True)
class Documents:
    """What is known of a unit's documents, in their order."""

    digests: np.ndarray  # (n,) S16
    sizes: np.ndarray  # (n,) int64, UTF-8 bytes
    domains: np.ndarray  # (n,) uint16, indices into the scan's domains


@dataclass(frozen=True)
class Scan:
    """What is known of a source's documents, unit by unit."""

    folder: Path
    domains: list[str]  # in order of appearance
    fingerprint: str  # of the domains' names and documents, wherever they lie
    layout: str  # of how they lie in units
    counts: list[int]  # documents of each unit
    num_bytes: int

    def unit(self, index: int) -> Documents:
        """Return the documents of one unit."""
        found, names = read_unit(self.folder, index)
        place = np.array([self.domains.index(name) for name in names], dtype=np.uint16)
        return Documents(found.digests, found.sizes, place[found.domains])

    def units(self) -> Iterator[Documents]:
        """Yield the documents of every unit, one unit in memory at a time."""
        for index in range(len(self.counts)):
            yield self.unit(index)


def scan_folder(source: Source, cache: Path) -> Path | None:
    """Return where the scan of a source is kept, if it can be.

    A file changed a moment ago may change once more and keep its size and time, which are all that tells.
    """
    if source.signature is None or 0 <= time.time_ns() - source.newest < SETTLED:
        return None
    return cache / "scans" / hashlib.sha256(json.dumps([FORMAT, source.signature]).encode()).hexdigest()[:32]


def known_scan(folder: Path | None) -> Scan | None:
    """Return a finished scan, None where there is none; what it knows of its units may be gone or damaged."""
    try:
        if folder is None:
            return None
        return Scan(folder, **json.loads((folder / SUMMARY).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def scan_source(source: Source, folder: Path, pool: Pool, report: Progress) -> Scan:
    """Read the units that `folder` does not know yet, and return the scan of all."""
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)  # it is in use
    units = source.units
    total = sum(unit.size for unit in units)
    missing = [index for index in range(len(units)) if not _is_whole(folder, index)]
    done = total - sum(units[index].size for index in missing)
    report("reading", done, total)
    for index in pool.run(scan_unit, ((folder, index, units[index]) for index in missing), lambda _size: None):
        done += units[index].size
        report("reading", done, total)
    return _summary(folder, len(units))


def scan_unit(folder: Path, index: int, unit: Unit, _advance: Advance) -> int:
    """Write what is known of a unit's documents, and return its index."""
    digests, sizes, places = bytearray(), array("q"), array("H")
    names: dict[str, int] = {}
    for domain, text in unit.documents():
        content = text.encode()
        digests += digest(content)
        sizes.append(len(content))
        places.append(names.setdefault(domain, len(names)))
        if len(names) > MAX_DOMAINS:
            raise _too_many_domains(list(names))
    with replacing(_unit_file(folder, index)) as file:
        np.savez(
            file,
            digests=np.frombuffer(digests, DIGEST),
            sizes=np.frombuffer(sizes, np.int64),
            domains=np.frombuffer(places, np.uint16),
            names=np.frombuffer(json.dumps(list(names)).encode(), np.uint8),
        )
    return index


def read_unit(folder: Path, index: int) -> tuple[Documents, list[str]]:
    """Return a unit's documents, whose domains are indices into the names beside them."""
    with np.load(_unit_file(folder, index)) as saved:
        names = json.loads(saved["names"].tobytes())
        return Documents(saved["digests"], saved["sizes"], saved["domains"]), names


def scanned_documents(folder: Path, index: int, unit: Unit) -> Iterator[tuple[str, str]]:
    """Yield (domain, text) of a unit's documents; raises `TextChangedError` unless they are those that were scanned."""
    known, names = read_unit(folder, index)
    digests = known.digests.tobytes()
    place = 0
    for place, (domain, text) in enumerate(unit.documents(), start=1):
        same = place <= len(known.sizes) and digests[16 * place - 16 : 16 * place] == digest(text)
        if not same or names[known.domains[place - 1]] != domain:
            raise TextChangedError(f"{unit.label}: {CHANGED}")
        yield domain, text
    if place != len(known.sizes):
        raise TextChangedError(f"{unit.label}: {CHANGED}")


def first_of_equal(scan: Scan) -> list[np.ndarray]:
    """Return for every unit which documents are the first of their content in the whole source, `(n,)` bool.

    The first is the one of the first domain, and in it the first: of which documents these are, the fingerprint tells,
    while how domains lie between each other it does not. Documents are compared in as many portions, by digest, as
    memory asks for.
    """
    starts = np.cumsum([0, *scan.counts])
    kept = np.zeros(starts[-1], dtype=bool)
    portions = -(-len(kept) // COMPARED)
    for portion in range(portions):
        halves, domains, places = [], [], []
        for start, documents in zip(starts, scan.units(), strict=False):
            pair = np.frombuffer(documents.digests.tobytes(), np.uint64).reshape(-1, 2)
            mine = np.flatnonzero(pair[:, 0] % np.uint64(portions) == portion)
            halves.append(pair[mine])
            domains.append(documents.domains[mine])
            places.append(start + mine)
        pairs, where = np.concatenate(halves), np.concatenate(places)
        order = np.lexsort((np.concatenate(domains), pairs[:, 1], pairs[:, 0]))  # stable: within a domain as they stand
        new = np.append(True, (pairs[order[1:]] != pairs[order[:-1]]).any(1))[: len(order)]
        kept[where[order[new]]] = True
    return [kept[start:stop] for start, stop in pairwise(starts)]


def _summary(folder: Path, num_units: int) -> Scan:
    """Put the units' scans together."""
    contents: dict[str, Any] = {}
    layout, counts, num_bytes = hashlib.sha256(), [], 0
    for index in range(num_units):
        documents, names = read_unit(folder, index)
        for place, name in enumerate(names):
            mine = documents.digests[documents.domains == place].tobytes()
            contents.setdefault(name, hashlib.sha256()).update(mine)
        layout.update(documents.digests.tobytes() + b"end of a unit")
        counts.append(len(documents.sizes))
        num_bytes += int(documents.sizes.sum())
    if len(contents) > MAX_DOMAINS:
        raise _too_many_domains(list(contents))
    identity = json.dumps([[name, content.hexdigest()] for name, content in contents.items()])
    summary = {
        "domains": list(contents),
        "fingerprint": hashlib.sha256(identity.encode()).hexdigest(),
        "layout": layout.hexdigest(),
        "counts": counts,
        "num_bytes": num_bytes,
    }
    write_json(folder / SUMMARY, summary)
    return Scan(folder, **summary)


def _is_whole(folder: Path, index: int) -> bool:
    try:
        read_unit(folder, index)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return False
    return True


def _unit_file(folder: Path, index: int) -> Path:
    return folder / f"{index:06}.npz"


def _too_many_domains(names: list[str]) -> DataError:
    return DataError(
        f"more than {MAX_DOMAINS} domains, such as {', '.join(map(repr, names[:3]))}; "
        "is data.domain_column a column that names few domains? (or put files together in sub-folders)"
    )
