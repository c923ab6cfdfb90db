"""Token ids of a text on disk: shard files, and a stream that reads several of them as if they were one array.

A shard holds ids, little-endian, 2 bytes each while the vocabulary fits, else 4, every document followed by the
end-of-document id. What belongs to it (counts, SHA-256) stands in the description of the corpus.
"""

import bisect
import functools
import hashlib
import itertools
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from himoe.files import partial_name

OPEN_FILES = 128  # shards mapped at a time, over all streams: each holds a file descriptor
BUFFER = 8 * 2**20  # bytes of tokens gathered, over all shards of a writer, before they go to disk


@dataclass(frozen=True, eq=False)  # a file opened anew is another one, whatever its name
class TokenFile:
    """A shard that is mapped into memory when it is needed."""

    path: Path
    dtype: np.dtype
    num_tokens: int

    def __len__(self) -> int:
        return self.num_tokens

    def __getitem__(self, part: slice) -> np.ndarray:
        return _mapped(self)[part]


class TokenStream:
    """Tokens of several arrays or shards as if they were one array, read as they are used.

    >>> stream = TokenStream.of([5, 1, 9, 2, 9], [4, 9], end_of_document=9)
    >>> stream[3:6].tolist(), len(stream), stream.num_documents
    ([2, 9, 4], 7, 3)
    """

    def __init__(
        self, parts: Sequence[np.ndarray | TokenFile], *, end_of_document: int, num_bytes: int, num_documents: int
    ) -> None:
        self.parts = list(parts)
        self.end_of_document = end_of_document
        self.num_bytes = num_bytes  # UTF-8 bytes of the text
        self.num_documents = num_documents
        self.dtype = np.dtype(self.parts[0].dtype if self.parts else np.uint16)
        self._ends = list(itertools.accumulate(map(len, self.parts)))
        self.num_tokens = self._ends[-1] if self._ends else 0

    @classmethod
    def of(cls, *arrays: Sequence[int] | np.ndarray, end_of_document: int, num_bytes: int | None = None) -> Self:
        """Return a stream of tokens in memory; `num_bytes` None counts a byte for each that ends no document."""
        width = token_type(1 + max([end_of_document, *(int(np.max(array)) for array in arrays if len(array))]))
        parts = [np.asarray(array, dtype=width) for array in arrays if len(array)]
        documents = sum(int((part == end_of_document).sum()) for part in parts)
        size = sum(map(len, parts)) - documents if num_bytes is None else num_bytes
        return cls(parts, end_of_document=end_of_document, num_bytes=size, num_documents=documents)

    def __len__(self) -> int:
        return self.num_tokens

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return tokens `part.start … part.stop`, `(n,)`, as they are stored; they may be a read-only view."""
        start, stop, step = part.indices(self.num_tokens)
        assert step == 1, "a stream is read forwards"
        found = []
        i = bisect.bisect_right(self._ends, start)
        while start < stop:
            offset = self._ends[i] - len(self.parts[i])
            found.append(self.parts[i][start - offset : stop - offset])
            start = self._ends[i]
            i += 1
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, self.dtype), *found])


@functools.lru_cache(maxsize=OPEN_FILES)
def _mapped(file: TokenFile) -> np.ndarray:
    return np.memmap(file.path, dtype=file.dtype, mode="r", shape=(file.num_tokens,))


def token_type(vocab_size: int) -> np.dtype:
    """Return the type that ids below `vocab_size` are stored in."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@dataclass
class _Growing:
    """A shard that is being written."""

    buffer: list[bytes] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)
    num_tokens: int = 0
    num_bytes: int = 0
    num_documents: int = 0


class ShardWriter:
    """Writes shards next to each other; they get their names together, in `finish`.

    Used as a context manager, which leaves no partial file behind. However many shards there are, no file stays open.
    """

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self._folder, self._dtype = folder, dtype
        self._shards: dict[str, _Growing] = {}
        self._buffered = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._shards:
            partial_name(self._folder / name).unlink(missing_ok=True)

    def add(self, name: str, ids: list[int] | np.ndarray, *, num_bytes: int, num_documents: int) -> None:
        """Append tokens to the shard `name`, and to its counts the text bytes and documents that they bring."""
        shard = self._shards.setdefault(name, _Growing())
        if isinstance(ids, list):
            ids = np.frombuffer(array("I", ids), np.uintc)  # numpy's own conversion takes three times as long
        content = ids.astype(self._dtype).tobytes()
        shard.buffer.append(content)
        shard.digest.update(content)
        shard.num_tokens += len(ids)
        shard.num_bytes += num_bytes
        shard.num_documents += num_documents
        self._buffered += len(content)
        if self._buffered >= BUFFER:
            self._flush()

    def finish(self) -> list[dict[str, Any]]:
        """Give all shards their names, and return a record of each: file, its size, counts and SHA-256."""
        self._flush()
        for name in self._shards:
            with partial_name(self._folder / name).open("ab") as file:
                os.fsync(file.fileno())
        for name in self._shards:
            partial_name(self._folder / name).replace(self._folder / name)
        return [
            {
                "file": name,
                "size": shard.num_tokens * self._dtype.itemsize,
                "tokens": shard.num_tokens,
                "bytes": shard.num_bytes,
                "documents": shard.num_documents,
                "sha256": shard.digest.hexdigest(),
            }
            for name, shard in self._shards.items()
        ]

    def _flush(self) -> None:
        for name, shard in self._shards.items():
            with partial_name(self._folder / name).open("ab") as file:
                file.writelines(shard.buffer)
            shard.buffer.clear()
        self._buffered = 0
