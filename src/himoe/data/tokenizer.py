"""Text ↔ token ids, two ways: plain UTF-8 bytes, or byte-level byte-pair encoding (BPE).

Both are lossless for any text: every token stands for a fixed string of bytes, decoding joins them. The last id marks
the end of a document; no text encodes to it, so a text cannot fake a boundary.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from himoe.errors import ConfigError, DataError

SMALLEST_BPE = 256 + 1 + 1  # every byte, one merge, the end of a document


class Tokenizer(Protocol):
    """What the rest of the package needs of a tokenizer."""

    name: str
    vocab_size: int
    end_of_document: int

    @property
    def hash(self) -> str: ...  # noqa: D102 - the protocol's fields are described at _ByteStrings

    @property
    def token_bytes(self) -> list[bytes]: ...  # noqa: D102

    @property
    def byte_lengths(self) -> np.ndarray: ...  # noqa: D102

    def encode(self, text: str) -> list[int]: ...  # noqa: D102

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...  # noqa: D102

    def decode(self, ids: Iterable[int]) -> str: ...  # noqa: D102

    def save(self, path: Path) -> None: ...  # noqa: D102
