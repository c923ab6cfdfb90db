"""The held-out split, decided by each document's content alone.

A document is held out when its hash, read as a number in [0, 1), is below the wanted fraction. Where that would leave
a side of a domain without enough, documents of the next hashes change sides, in all domains that have them. So the
split does not depend on the order of files, and equal documents fall on the same side wherever they stand.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from himoe.errors import DataError

DIGEST = "S16"  # how arrays hold digests; numpy drops trailing zero bytes of a single one, comparisons are exact


def digest(document: str | bytes) -> bytes:
    """Return the 16-byte content hash that places a document in the split; another key would be another split."""
    content = document.encode() if isinstance(document, str) else document
    return hashlib.blake2b(content, digest_size=16, key=bytes(8)).digest()


class Lowest:
    """Of all documents added, the distinct ones of the lowest digests that together reach `wanted` bytes.

    `digests (n,)` is sorted; the memory is that of these alone.
    """

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.digests = np.empty(0, DIGEST)
        self.sizes = np.empty(0, np.int64)

    def add(self, digests: np.ndarray, sizes: np.ndarray) -> None:
        """Take in documents, `digests (n,)` and `sizes (n,)` in bytes."""
        if self.sizes.sum() >= self.wanted:
            low = digests < self.digests[-1]
            digests, sizes = digests[low], sizes[low]
        distinct, first = np.unique(np.concatenate([self.digests, digests]), return_index=True)
        sizes = np.concatenate([self.sizes, sizes])[first]
        count = int(np.searchsorted(np.cumsum(sizes), self.wanted)) + 1
        self.digests, self.sizes = distinct[:count], sizes[:count]


class HeldOut:
    """Finds the bound of one domain from the digests and sizes of its documents, added in any order.

    Where the fraction gives less than `minimum_bytes`, the documents of the next lowest digests follow; the one of the
    highest digest is always trained on.
    """

    def __init__(self, fraction: float, minimum_bytes: int = 1) -> None:
        if not 0 < fraction < 1:
            raise DataError(f"held_out is {fraction}; allowed is a fraction between 0 and 1, such as 0.05")
        self.usual = int(fraction * 2**128).to_bytes(16, "big")  # the bound where documents are many
        self._lowest = Lowest(max(minimum_bytes, 1))
        self._ends: list[bytes] = []  # lowest and highest digest so far

    def add(self, digests: np.ndarray, sizes: np.ndarray) -> None:
        """Take in documents, `digests (n,)` and `sizes (n,)` in bytes."""
        if len(digests):
            self._lowest.add(digests, sizes)
            order = np.sort(digests)
            seen = sorted({*self._ends, _bytes(order[0]), _bytes(order[-1])})
            self._ends = [seen[0], seen[-1]] if len(seen) > 1 else seen

    def bound(self, where: str) -> bytes:
        """Return the digest below which documents are held out; raises `DataError` unless both sides get one."""
        if len(self._ends) < 2:
            raise DataError(
                f"{where}: too short to hold a part out, it has {'one document only' if self._ends else 'no document'};"
                " give a longer text, or put short files together in one sub-folder to make them one domain"
            )
        needed = int.from_bytes(_bytes(self._lowest.digests[-1]), "big") + 1
        highest = int.from_bytes(self._ends[-1], "big")
        return min(max(int.from_bytes(self.usual, "big"), needed), highest).to_bytes(16, "big")

    def exceptions(self, where: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the digests held out beyond the usual bound, and those below it that are trained on."""
        usual, bound = np.array(self.usual, DIGEST), np.array(self.bound(where), DIGEST)
        low = self._lowest.digests
        return low[(low >= usual) & (low < bound)], np.array(self._ends[-1:] if bound < usual else [], DIGEST)


@dataclass(frozen=True)
class Split:
    """Which documents are held out: those of a digest below `bound`, but for some that a domain needs on one side."""

    bound: bytes
    held_out: np.ndarray  # (n,) digests that are not below it
    trained: np.ndarray  # (n,) digests that are

    @classmethod
    def of(cls, parts: Sequence[HeldOut], names: Sequence[str]) -> "Split":
        """Return the split that gives each of some domains, of one fraction, what it needs on both sides."""
        held_out, trained = zip(*(part.exceptions(name) for part, name in zip(parts, names, strict=True)), strict=True)
        return cls(parts[0].usual, np.concatenate(held_out), np.concatenate(trained))

    def is_held_out(self, digests: np.ndarray) -> np.ndarray:
        """Return which of some documents are held out, `(n,)` bool."""
        below = digests < np.array(self.bound, DIGEST)
        return (below & ~np.isin(digests, self.trained)) | np.isin(digests, self.held_out)


def _bytes(digest: np.bytes_) -> bytes:
    return bytes(digest).ljust(16, b"\0")
