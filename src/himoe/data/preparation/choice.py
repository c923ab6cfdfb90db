"""What a scan decides: which documents are held out, and from which the tokenizer learns."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from himoe.data.preparation.pool import Advance, Pool
from himoe.data.preparation.scan import Documents, Progress, Scan, scanned_documents
from himoe.data.preparation.split import HeldOut, Lowest, Split, digest
from himoe.data.text import Source, Unit
from himoe.errors import DataError

BPE_SAMPLE = 16 * 2**20  # bytes of training text that the merges are learned from

Kept = Sequence[np.ndarray | None]  # for every unit the documents that are no duplicates, `(n,)` bool; None: all


def split(name: str, scan: Scan, kept: Kept, fraction: float, minimum_bytes: int) -> Split:
    """Return which documents are held out; raises `DataError` unless every domain gets both sides."""
    if not scan.domains:
        raise DataError(f"{name}: every document in it is blank; give text")
    parts = [HeldOut(fraction, minimum_bytes) for _ in scan.domains]
    for documents, keep in zip(scan.units(), kept, strict=True):
        _add_by_domain(parts, documents, keep)
    found = Split.of(parts, [f"{name}, domain {domain}" for domain in scan.domains])
    if len(found.held_out) + len(found.trained):
        _check_sides(name, scan, kept, found)
    return found


def _check_sides(name: str, scan: Scan, kept: Kept, split: Split) -> None:
    """Raise `DataError` where what one domain needs on a side was all that another had on the other side."""
    there = np.zeros((2, len(scan.domains)), dtype=bool)
    for documents, keep in zip(scan.units(), kept, strict=True):
        chosen = slice(None) if keep is None else keep
        there[split.is_held_out(documents.digests)[chosen].astype(int), documents.domains[chosen]] = True
    for side, present in zip(("train on", "hold out"), there, strict=True):
        if not present.all():
            raise DataError(
                f"{name}, domain {scan.domains[int(present.argmin())]}: shares so many of its few documents with other "
                f"domains that none is left to {side}; put these domains together, or set data.deduplicate"
            )


def _add_by_domain(parts: Sequence[HeldOut | Lowest], documents: Documents, chosen: np.ndarray | None) -> None:
    """Hand every domain's documents, or the chosen ones `(n,)` bool, to its part."""
    for place in np.unique(documents.domains):
        mine = documents.domains == place
        mine = mine if chosen is None else mine & chosen
        parts[place].add(documents.digests[mine], documents.sizes[mine])


def training_sample(source: Source, scan: Scan, kept: Kept, split: Split, pool: Pool, report: Progress) -> list[str]:
    """Return different training documents: an equal share of `BPE_SAMPLE` per domain, lowest digests first.

    Equal shares, because in proportion to size a small domain would get no tokens of its own.
    """
    share = -(-BPE_SAMPLE // len(scan.domains))
    lowest = [Lowest(share) for _ in scan.domains]
    for documents, keep in zip(scan.units(), kept, strict=True):
        train = ~split.is_held_out(documents.digests)
        _add_by_domain(lowest, documents, train if keep is None else train & keep)
    places = _places_of(scan, [part.digests for part in lowest])
    total, done = sum(int(part.sizes.sum()) for part in lowest), 0
    report("sampling", 0, total)
    found: list[tuple[int, bytes, str]] = []
    tasks = ((scan.folder, i, source.units[i], at, share) for i, at in places)
    for texts in pool.run(read_texts, tasks, lambda _size: None):
        found += [(scan.domains.index(domain), digest(text), text) for domain, text in texts]
        done += sum(len(text.encode()) for _, text in texts)
        report("sampling", done, total)
    return [text for _, _, text in sorted(found)]


def _places_of(scan: Scan, wanted: Sequence[np.ndarray]) -> Iterator[tuple[int, list[int]]]:
    """Yield of each unit where the first documents with the wanted digests of their domain stand, `wanted` sorted."""
    missing = [np.ones(len(digests), dtype=bool) for digests in wanted]
    for unit, documents in enumerate(scan.units()):
        places = []
        for domain in np.unique(documents.domains):
            mine = np.flatnonzero(documents.domains == domain)
            digests, first = np.unique(documents.digests[mine], return_index=True)
            at = np.searchsorted(wanted[domain], digests)
            hit = np.flatnonzero(at < len(wanted[domain]))
            hit = hit[(wanted[domain][at[hit]] == digests[hit]) & missing[domain][at[hit]]]
            missing[domain][at[hit]] = False
            places += mine[first[hit]].tolist()
        if places:
            yield unit, sorted(places)


def read_texts(
    scans: Path,
    index: int,
    unit: Unit,
    places: list[int],
    longest: int,
    advance: Advance,  # noqa: ARG001
) -> list[tuple[str, str]]:
    """Return domain and text, up to `longest` characters, of a unit's documents at the given places, sorted."""
    wanted = iter(places)
    next_place, texts = next(wanted, None), []
    for place, (domain, text) in enumerate(scanned_documents(scans, index, unit)):
        if place == next_place:
            texts.append((domain, text[:longest]))
            if (next_place := next(wanted, None)) is None:
                break
    return texts
