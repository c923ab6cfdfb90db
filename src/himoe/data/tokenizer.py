"""Text ↔ token ids, two ways: plain UTF-8 bytes, or byte-level byte-pair encoding (BPE).

Both are lossless for any text: every token stands for a fixed string of bytes, and decoding joins them. The last id
marks the end of a document. No text encodes to it, so no text can fake a boundary.
"""

import functools
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from himoe.errors import ConfigError, DataError

SMALLEST_BPE = 256 + 1 + 1  # every byte, one merge, the end of a document

# Stated, so that the library does not warn and fall back to one thread when a process forks after it was used.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


class Tokenizer(ABC):
    """A list of byte strings, one per token id, and a way to cut text into them.

    The id after the last byte string is `end_of_document`, which stands for no bytes; `vocab_size` counts it.
    """

    name: str

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self.token_bytes = [*token_bytes, b""]
        self.vocab_size = len(self.token_bytes)
        self.end_of_document = self.vocab_size - 1

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of every text."""

    @abstractmethod
    def to_json(self) -> str:
        """Return all that `load_tokenizer` needs."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of one text; raises `DataError` where it holds half a surrogate pair."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"text is not valid Unicode at character {error.start}; give text read as UTF-8") from None
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that end inside a character become U+FFFD, ends of documents vanish."""
        return b"".join(self.token_bytes[i] for i in ids).decode(errors="replace")

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes every token stands for, `(vocab_size,)` int64: `byte_lengths[ids].sum()` measures a text."""
        return np.array([len(token) for token in self.token_bytes], dtype=np.int64)

    @functools.cached_property
    def hash(self) -> str:
        """Hex hash of everything that decides how text is cut."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the tokenizer as one JSON file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte: 256 ids and the end of a document.

    >>> ByteTokenizer().encode("né")
    [110, 195, 169]
    """

    name = "byte"

    def __init__(self) -> None:
        super().__init__([bytes([value]) for value in range(256)])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the UTF-8 bytes of every text."""
        return [list(text.encode()) for text in texts]

    def to_json(self) -> str:
        """Return a note that says which tokenizer this is."""
        return json.dumps({"himoe_tokenizer": "byte"})


class BPETokenizer(Tokenizer):
    """Byte-level BPE by the `tokenizers` library; its `tokenizer.json` is the common Hugging Face format.

    The end of a document is not in that file: it is the id after its last one.
    """

    name = "bpe"

    def __init__(self, model: tokenizers.Tokenizer) -> None:
        ids = model.get_vocab()
        byte_of = {symbol: value for value, symbol in enumerate(_byte_symbols())}
        super().__init__([bytes(byte_of[symbol] for symbol in token) for token in sorted(ids, key=lambda t: ids[t])])
        self.model = model

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn merges until there are `vocab_size` ids, fewer where a short text offers no more pairs.

        >>> BPETokenizer.train(["low lower lowest"] * 9, 260).vocab_size
        260
        """
        if vocab_size < SMALLEST_BPE:
            raise ConfigError(f"data.vocab_size is {vocab_size}; a byte-level BPE needs at least {SMALLEST_BPE}")
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=2,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)
        return cls(model)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of every text, on all cores."""
        return [encoding.ids for encoding in self.model.encode_batch_fast(texts, add_special_tokens=False)]

    def to_json(self) -> str:
        """Return the library's own JSON."""
        return self.model.to_str()


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a file that `save` wrote; raises `DataError` when it is missing or no tokenizer."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if json.loads(text).get("himoe_tokenizer") == "byte":
            return ByteTokenizer()
        return BPETokenizer(tokenizers.Tokenizer.from_str(text))
    except OSError as error:
        raise DataError(f"{path}: cannot read the tokenizer: {error.strerror}") from error
    except Exception as error:  # the library raises plain Exception on a foreign file
        raise DataError(f"{path}: not a tokenizer.json of a byte or byte-level BPE tokenizer: {error}") from error


def _byte_symbols() -> list[str]:
    """Return the printable character that byte-level BPE writes for each byte (the table of GPT-2)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(value if value in printable else next(spare)) for value in range(256)]
