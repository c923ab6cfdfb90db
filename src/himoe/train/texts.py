"""Text to score: token ids in memory or on disk, or text that is read and encoded while it is scored."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from himoe.data import Tokenizer, TokenStream
from himoe.data.text import Source

Piece = tuple[str, np.ndarray, int]
"""The next tokens of a domain, each document followed by its end, and how many UTF-8 bytes of text came with them."""

Progress = Callable[[float], object]  # how much is done, 0 … 1
PIECE = 2**20  # characters that are encoded at a time, tokens that are read at a time


@dataclass(frozen=True)
class Text:
    """Token ids of one domain and the number of UTF-8 bytes they encode."""

    tokens: np.ndarray | TokenStream
    num_bytes: int

    @classmethod
    def encode(cls, documents: Sequence[str], tokenizer: Tokenizer) -> "Text":
        """Encode documents, each followed by the end-of-document token, as a token file holds them."""
        end = tokenizer.end_of_document
        ids = [np.append(np.asarray(ids, dtype=np.int64), end) for ids in tokenizer.encode_batch(documents)]
        return cls(np.concatenate(ids), sum(len(document.encode()) for document in documents))

    def prefix(self, num_tokens: int | None, byte_lengths: np.ndarray) -> "Text":
        """Return the first `num_tokens` tokens, all for None; `byte_lengths[id]` are the bytes of each token.

        >>> Text(np.array([1, 0, 1]), 5).prefix(2, np.array([1, 2])).num_bytes
        3
        """
        if num_tokens is None or num_tokens >= len(self.tokens):
            return self
        first = self.tokens[:num_tokens]
        return Text(first, int(byte_lengths[first].sum()))


def token_pieces(texts: Mapping[str, Text], progress: Progress | None = None) -> Iterator[Piece]:
    """Yield one domain after the other; the bytes of a text come with its first piece."""
    total, done = sum(len(text.tokens) for text in texts.values()), 0
    for name, text in texts.items():
        for start in range(0, len(text.tokens), PIECE):
            tokens = text.tokens[start : start + PIECE]
            yield name, tokens, 0 if start else text.num_bytes
            done += len(tokens)
            if progress:
                progress(done / total)


def source_pieces(source: Source, tokenizer: Tokenizer, progress: Progress | None = None) -> Iterator[Piece]:
    """Yield the documents of a source as it has them, read and encoded as they are needed."""
    total, done = max(1, sum(unit.size for unit in source.units)), 0
    for unit in source.units:
        read = 0
        for batch in _batches(unit.documents()):
            for domain, documents in batch.items():
                text = Text.encode(documents, tokenizer)
                yield domain, text.tokens[:], text.num_bytes
                read += text.num_bytes
            if progress:
                progress((done + min(read, unit.size)) / total)
        done += unit.size


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[dict[str, list[str]]]:
    """Yield documents by domain, about PIECE characters at a time."""
    batch: dict[str, list[str]] = {}
    size = 0
    for domain, text in documents:
        batch.setdefault(domain, []).append(text)
        size += len(text)
        if size >= PIECE:
            yield batch
            batch, size = {}, 0
    if batch:
        yield batch
