"""Held-out loss per domain: pure cross-entropy, never with auxiliary terms.

A file is read as windows that overlap by one token, so every token is predicted exactly once; the end-of-document token
stands before the first one, as it does in training between documents. The last window is padded, and its padding masked
out of the loss and of the routing. Bits per byte are the nats of all tokens (end-of-document tokens included) / ln 2 /
the UTF-8 bytes of the text they encode, so that tokenizers compare.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class TextDecoder(Protocol):
    """The part of a tokenizer that counting bytes needs."""

    @property
    def end_of_document(self) -> int:
        """The id that ends every document."""
        ...

    def decode(self, ids: list[int], /) -> str:
        """Return the text of `ids`."""
        ...


@dataclass(frozen=True)
class Text:
    """Tokens of one domain and the number of UTF-8 bytes they encode."""

    tokens: np.ndarray
    num_bytes: int


@dataclass(frozen=True)
class Score:
    """Total nats over a text.

    >>> score = Score(nats=2 * math.log(2), tokens=2, num_bytes=1)
    >>> score.loss / math.log(2), round(score.perplexity, 12), score.bits_per_byte
    (1.0, 2.0, 2.0)
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
        return math.exp(min(self.loss, 700.0))  # larger is no finite number, and JSON has no other

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of the text."""
        return self.nats / math.log(2) / self.num_bytes

    def record(self) -> dict[str, float]:
        """Return what the run folder stores of a domain."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.num_bytes,
        }
