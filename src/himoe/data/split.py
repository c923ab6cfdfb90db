"""The held-out split of a domain, decided by each document's content alone.

A document is held out when its hash, read as a number in [0, 1), is below the wanted fraction. So the split does not
depend on the order of files, adding a document moves no other, and equal documents fall on the same side.
"""

import bisect
import hashlib
from collections.abc import Sequence

from himoe.errors import DataError


def digest(document: str) -> bytes:
    """Return the 16-byte content hash that places a document in the split; another key would be another split."""
    return hashlib.blake2b(document.encode(), digest_size=16, key=bytes(8)).digest()


def split_documents(
    documents: Sequence[str], fraction: float, *, minimum_bytes: int = 1, where: str = "data"
) -> tuple[list[str], list[str]]:
    """Return the training and held-out documents, each in the given order.

    Where the fraction gives less than `minimum_bytes` (UTF-8), the documents of the next lowest hashes follow.
    Raises `DataError` unless both sides get at least one document.

    >>> train, held_out = split_documents([f"document {i}" for i in range(100)], 0.2)
    >>> len(train), len(held_out)
    (83, 17)
    """
    if not 0 < fraction < 1:
        raise DataError(f"held_out is {fraction}; allowed is a fraction between 0 and 1, such as 0.05")
    digests = [digest(document) for document in documents]
    sizes = {key: len(document.encode()) for key, document in zip(digests, documents, strict=True)}
    if len(sizes) < 2:
        raise DataError(
            f"{where}: too short to hold a part out, it has {'one document only' if sizes else 'no document'}; "
            "give a longer text, or put short files together in one sub-folder to make them one domain"
        )
    order = sorted(sizes)
    count = bisect.bisect_left(order, int(fraction * 2**128).to_bytes(16, "big"))
    while count < len(order) - 1 and sum(sizes[key] for key in order[:count]) < minimum_bytes:
        count += 1
    held_out = set(order[: min(count, len(order) - 1)])
    return (
        [document for key, document in zip(digests, documents, strict=True) if key not in held_out],
        [document for key, document in zip(digests, documents, strict=True) if key in held_out],
    )
