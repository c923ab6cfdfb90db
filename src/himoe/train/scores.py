"""Nats of predicted tokens, added up: over a text, by how much context a token had, by how long its document is.

Memory does not grow with the text: a bucket is three sums, and of the documents only the open one is kept.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

LIMITS = 16 * 4 ** np.arange(24, dtype=np.int64)
"""Last number of every bucket, so that a window's latest tokens share one: they see a quarter to all of its length."""


@dataclass(frozen=True)
class Score:
    """Total nats over a text.

    >>> score = Score(nats=2 * math.log(2), tokens=2, num_bytes=1)
    >>> round(score.perplexity, 12), score.bits_per_byte
    (2.0, 2.0)
    """

    nats: float
    tokens: int
    num_bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(min(self.loss, 700.0))  # beyond it there is no finite number, and JSON has no other

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per UTF-8 byte of the text; None for tokens that stand for no bytes."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else None

    def __add__(self, other: "Score") -> "Score":
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.num_bytes + other.num_bytes)

    def record(self) -> dict[str, Any]:
        """Return what the run folder stores of a domain."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.num_bytes,
        }


class Buckets:
    """Scores by a number of tokens: 0–16, 17–64, 65–256, 257–1024, ….

    >>> buckets = Buckets()
    >>> buckets.add(np.array([3, 17, 18]), np.array([1.0, 2.0, 3.0]), np.ones(3), np.ones(3))
    >>> [(record["from"], record["to"], record["loss"]) for record in buckets.records()]
    [(0, 16, 1.0), (17, 64, 2.5)]
    """

    def __init__(self) -> None:
        self.sums = np.zeros((3, len(LIMITS)))  # nats, tokens, bytes: whole numbers stay exact up to 2⁵³

    def add(self, of: np.ndarray, nats: np.ndarray, tokens: np.ndarray, num_bytes: np.ndarray) -> None:
        """Add `nats[i]` over `tokens[i]` tokens and `num_bytes[i]` bytes to the bucket of `of[i]`; all are (N,)."""
        bucket = np.searchsorted(LIMITS, of)
        columns = (nats, tokens, num_bytes)
        self.sums += [np.bincount(bucket, weights=values, minlength=len(LIMITS)) for values in columns]

    def __add__(self, other: "Buckets") -> "Buckets":
        result = Buckets()
        result.sums = self.sums + other.sums
        return result

    def records(self) -> list[dict[str, Any]]:
        """Return `{"from", "to", "loss", "bits_per_byte", "tokens", "bytes"}` of every bucket that holds tokens."""
        records, first = [], 0
        for last, (nats, tokens, num_bytes) in zip(LIMITS.tolist(), self.sums.T.tolist(), strict=True):
            if tokens:
                record = Score(nats, int(tokens), int(num_bytes)).record()
                del record["perplexity"]
                records.append({"from": first, "to": last, **record})
            first = last + 1
        return records


class TextScore:
    """The score of one text, added up as its tokens come, in order.

    Args:
        end_of_document: the id that ends a document; it counts as a token of the document that it ends.
        byte_lengths: (V,) UTF-8 bytes of every token, for the buckets; None: these count no bytes.
    """

    def __init__(self, end_of_document: int, byte_lengths: np.ndarray | None = None) -> None:
        self.end_of_document, self.byte_lengths = end_of_document, byte_lengths
        self.nats, self.tokens, self.num_bytes = 0.0, 0, 0
        self.by_context, self._by_length = Buckets(), Buckets()
        self._open = np.zeros(3)  # nats, tokens, bytes of the document that has not ended yet

    def add(self, targets: np.ndarray, nats: np.ndarray, context: np.ndarray) -> None:
        """Add the text's next tokens; all are (N,): ids, nats, tokens of the same document seen before each."""
        self.nats += float(nats.sum())
        self.tokens += len(targets)
        ones = np.ones(len(targets))
        num_bytes = 0 * ones if self.byte_lengths is None else self.byte_lengths[targets].astype(np.float64)
        self.by_context.add(context, nats, ones, num_bytes)
        ends = targets == self.end_of_document
        document = np.cumsum(ends) - ends  # an end belongs to the document before it
        sums = np.stack([np.bincount(document, weights=values) for values in (nats, ones, num_bytes)])
        sums[:, 0] += self._open
        whole = sums.shape[1] if ends[-1] else sums.shape[1] - 1
        self._open = np.zeros(3) if ends[-1] else sums[:, -1]
        self._add_documents(self._by_length, sums[:, :whole], ended=1)

    @staticmethod
    def _add_documents(buckets: Buckets, sums: np.ndarray, ended: int) -> None:
        nats, tokens, num_bytes = sums
        buckets.add(tokens - ended, nats, tokens, num_bytes)

    @property
    def by_length(self) -> Buckets:
        """Scores by the tokens of a document, its end not counted; one that is cut off has the length that was read."""
        result = self._by_length + Buckets()
        if self._open[1]:
            self._add_documents(result, self._open[:, None], ended=0)
        return result

    @property
    def total(self) -> Score:
        """The whole text's score."""
        return Score(self.nats, self.tokens, self.num_bytes)
