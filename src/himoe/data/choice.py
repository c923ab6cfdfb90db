"""What a scan decides: which documents are held out, and from which the tokenizer learns."""

from collections.abc import Iterator, Sequence

import numpy as np

from himoe.data.pool import Advance, Pool
from himoe.data.scan import Documents, Progress, Scan
from himoe.data.sources import Source, Unit
from himoe.data.split import DIGEST, HeldOut, Lowest, digest

BPE_SAMPLE = 16 * 2**20  # bytes of training text that the merges are learned from

Kept = Sequence[np.ndarray | None]  # for every unit the documents that are no duplicates, `(n,)` bool; None: all


def bounds(name: str, scan: Scan, kept: Kept, fraction: float, minimum_bytes: int) -> list[bytes]:
    """Return for every domain the digest below which documents are held out."""
    parts = [HeldOut(fraction, minimum_bytes) for _ in scan.domains]
    for documents, keep in zip(scan.units(), kept, strict=True):
        _add_by_domain(parts, documents, keep)
    return [part.bound(f"{name}, domain {domain}") for part, domain in zip(parts, scan.domains, strict=True)]


def _add_by_domain(parts: Sequence[HeldOut | Lowest], documents: Documents, chosen: np.ndarray | None) -> None:
    """Hand every domain's documents, or the chosen ones `(n,)` bool, to its part."""
    for place in np.unique(documents.domains):
        mine = documents.domains == place
        mine = mine if chosen is None else mine & chosen
        parts[place].add(documents.digests[mine], documents.sizes[mine])


def is_held_out(documents: Documents, bounds: Sequence[bytes]) -> np.ndarray:
    """Return which documents are held out, `(n,)` bool; `bounds` are those of the documents' domain indices."""
    return documents.digests < np.array(bounds, DIGEST)[documents.domains]


def training_sample(
    source: Source, scan: Scan, kept: Kept, bounds: Sequence[bytes], pool: Pool, report: Progress
) -> list[str]:
    """Return different training documents: an equal share of `BPE_SAMPLE` per domain, lowest digests first.

    Equal shares, because in proportion to size a small domain would get no tokens of its own.
    """
    share = -(-BPE_SAMPLE // len(scan.domains))
    lowest = [Lowest(share) for _ in scan.domains]
    for documents, keep in zip(scan.units(), kept, strict=True):
        train = ~is_held_out(documents, bounds)
        _add_by_domain(lowest, documents, train if keep is None else train & keep)
    places = _places_of(scan, [part.digests for part in lowest])
    total, done = sum(int(part.sizes.sum()) for part in lowest), 0
    report("sampling", 0, total)
    found: list[tuple[int, bytes, str]] = []
    for texts in pool.run(read_texts, ((source.units[i], at, share) for i, at in places), lambda _size: None):
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


def read_texts(unit: Unit, places: list[int], longest: int, advance: Advance) -> list[tuple[str, str]]:  # noqa: ARG001
    """Return domain and text, up to `longest` characters, of a unit's documents at the given places, sorted."""
    wanted = iter(places)
    next_place, texts = next(wanted, None), []
    for place, (domain, text) in enumerate(unit.documents()):
        if place == next_place:
            texts.append((domain, text[:longest]))
            if (next_place := next(wanted, None)) is None:
                break
    return texts
