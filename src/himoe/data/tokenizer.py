"""Text ↔ token ids, three ways: plain UTF-8 bytes, byte-pair encoding (BPE) learned here, or anybody's tokenizer.json.

Each has an id that marks the end of a document. No text encodes to it, so no text can fake a border: what looks like a
special token in a text is encoded as the letters it is made of.
"""

import functools
import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from himoe.errors import ConfigError, DataError

SMALLEST_BPE = 256 + 1 + 1  # every byte, one merge, the end of a document
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")  # of documents, in known vocabularies
GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))  # the same two files under both their names
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece writes a byte of a character it does not know
CUTS = {"ByteLevel", "Split", "Digits", "Punctuation"}  # steps before the merges that can keep every byte

# Stated, so that the library does not warn and fall back to one thread when a process forks after it was used.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


class Tokenizer(ABC):
    """A list of token ids and a way to cut text into them; `vocab_size` counts the one that ends a document.

    `exact` says that any text is got back from its ids, and that `byte_lengths` then measure it. Where it is False
    (text is normalised, or has unknown parts) they are estimates: what decoding a token adds. Bits per byte are right
    all the same if bytes are counted from the text, as token files do.
    """

    name: str
    vocab_size: int
    end_of_document: int
    exact: bool

    @functools.cached_property
    @abstractmethod
    def token_bytes(self) -> list[bytes]:
        """What every id stands for, nothing for `end_of_document` and for ids that the vocabulary leaves out."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> Sequence[list[int] | np.ndarray]:
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
        return np.asarray(self.encode_batch([text])[0], dtype=np.int64).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that end inside a character become U+FFFD, ends of documents vanish."""
        return b"".join(self.token_bytes[i] for i in ids).decode(errors="replace")

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes every token stands for, `(vocab_size,)` int64: where `exact`, their sum measures a text."""
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

    name, vocab_size, end_of_document, exact = "byte", 257, 256, True

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """Every byte, and nothing for the end of a document."""
        return [*(bytes([value]) for value in range(256)), b""]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the UTF-8 bytes of every text, uint8."""
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def to_json(self) -> str:
        """Return a note that says which tokenizer this is."""
        return json.dumps({"himoe_tokenizer": "byte"})


class LibraryTokenizer(Tokenizer):
    """Any tokenizer of the `tokenizers` library; its `tokenizer.json` is the common Hugging Face format.

    The end of a document is the special token that the vocabulary has for it, else the id after its last one.
    """

    def __init__(self, model: tokenizers.Tokenizer) -> None:
        model.no_truncation()  # some files cut every text at the length of the model that they were made for
        model.no_padding()
        model.encode_special_tokens = True  # as ordinary text
        if getattr(model.model, "dropout", None):
            model.model.dropout = None  # merges left out at random would make every encoding another one
        self.model = model
        self.spec = json.loads(model.to_str())
        self.ids = model.get_vocab(with_added_tokens=True)
        self.special = {token["id"] for token in self.spec["added_tokens"] if token["special"]}
        self.name = self.spec["model"]["type"].lower()
        last = max(self.ids.values(), default=-1)
        self.end_of_document = next((self.ids[end] for end in ENDS if self._ends_documents(end)), last + 1)
        self.vocab_size = max(last, self.end_of_document) + 1
        self.exact = self._keeps_every_byte()

    def __reduce__(self) -> tuple:
        return type(self), (self.model,)  # the library forgets `encode_special_tokens` on the way

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of every text, on all cores."""
        try:
            return [encoding.ids for encoding in self.model.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as error:  # the library raises plain Exception, as for an unknown word that has no token
            raise DataError(f"the tokenizer cannot encode this text: {error}; give another data.tokenizer") from error

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that end inside a character become U+FFFD, ends of documents vanish."""
        return super().decode(ids) if self._byte_level else self._decode(*map(int, ids))

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """What every id stands for: exact for byte-level vocabularies, else what decoding it adds to a text."""
        found = [b""] * self.vocab_size
        if self._byte_level:
            byte_of = {symbol: value for value, symbol in enumerate(_byte_symbols())}
            added = {token["id"] for token in self.spec["added_tokens"]}
            for token, i in self.ids.items():
                plain = i in added or not byte_of.keys() >= set(token)
                found[i] = token.encode() if plain else bytes(byte_of[symbol] for symbol in token)
        else:
            before = next((i for i in self.ids.values() if i not in self.special and self._decode(i)), 0)
            start = self._decode(before)
            for token, i in self.ids.items():
                byte = BYTE_TOKEN.fullmatch(token)
                found[i] = bytes.fromhex(byte[1]) if byte else self._decode(before, i).removeprefix(start).encode()
        if self.end_of_document < len(found):
            found[self.end_of_document] = b""
        return found

    def to_json(self) -> str:
        """Return the library's own JSON."""
        return self.model.to_str()

    def _decode(self, *ids: int) -> str:
        """Return what the library makes of some ids."""
        return self.model.decode(list(map(int, ids)), skip_special_tokens=True)

    def _ends_documents(self, token: str) -> bool:
        """Say whether a token is special and out of reach of text; some vocabularies also find it as a word."""
        if self.ids.get(token) not in self.special:
            return False
        texts = [token, f" {token} ", f"a{token}a", f"a {token}\n"]
        return all(self.ids[token] not in self.model.encode(text, add_special_tokens=False).ids for text in texts)

    @functools.cached_property
    def _byte_level(self) -> bool:
        """Whether tokens are bytes written as the characters of GPT-2's table."""
        return any(step["type"] == "ByteLevel" for step in _steps(self.spec["pre_tokenizer"], "pretokenizers"))

    def _keeps_every_byte(self) -> bool:
        """Say whether decoding gives back every text, as far as the parts of the tokenizer are known to."""
        model, added = self.spec["model"], self.spec["added_tokens"]
        steps = list(_steps(self.spec["pre_tokenizer"], "pretokenizers"))
        return (
            self._byte_level
            and self.spec["normalizer"] is None
            and model["type"] == "BPE"
            and not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
            and set(_byte_symbols()) <= self.ids.keys()
            and all(step["type"] in CUTS and step.get("behavior") != "Removed" for step in steps)
            and not any(step.get("add_prefix_space") for step in steps)
            and not any(token["lstrip"] or token["rstrip"] for token in added if not token["special"])
        )


class BPETokenizer(LibraryTokenizer):
    """Byte-level BPE learned from text: lossless for any text, as every byte is a token."""

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn merges until there are `vocab_size` ids, fewer where a short text offers no more pairs.

        >>> BPETokenizer.train(["low lower lowest"] * 9, 260).vocab_size
        260
        """
        if vocab_size < SMALLEST_BPE:
            raise ConfigError(f"data.vocab_size is {vocab_size}; a byte-level BPE needs at least {SMALLEST_BPE}")
        model = _byte_level(tokenizers.Tokenizer(tokenizers.models.BPE()))
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=2,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)
        return cls(model)


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json, a file that `save` wrote, or a folder with either or with GPT-2's two files.

    Raises `DataError` when it is missing or no tokenizer.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    for names in GPT2_FILES:
        files = [folder / name for name in names]
        asked = path in files or (path.is_dir() and not (path / "tokenizer.json").exists())
        if asked and all(file.is_file() for file in files):
            return _from_gpt2_files(*files)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
        if json.loads(text).get("himoe_tokenizer") == "byte":
            return ByteTokenizer()
        return LibraryTokenizer(tokenizers.Tokenizer.from_str(text))
    except OSError as error:
        raise DataError(
            f"{file}: cannot read the tokenizer: {error.strerror}; give a tokenizer.json, or a folder with one or with "
            "encoder.json and vocab.bpe"
        ) from error
    except Exception as error:  # the library raises plain Exception on a foreign file
        raise DataError(f"{file}: not a tokenizer.json: {' '.join(str(error).split())}") from error


def _from_gpt2_files(vocabulary: Path, merges: Path) -> LibraryTokenizer:
    """Read a byte-level BPE from the two files that GPT-2 came with."""
    try:
        ids = json.loads(vocabulary.read_text(encoding="utf-8"))
        lines = [line.split(" ") for line in merges.read_text(encoding="utf-8").splitlines()]
        pairs = [(line[0], line[1]) for line in lines if len(line) == 2 and line[0] != "#version:"]
        if missing := [token for pair in pairs for token in (*pair, "".join(pair)) if token not in ids]:
            raise ValueError(f"there is no token {missing[0]!r}")
        model = tokenizers.Tokenizer(tokenizers.models.BPE(ids, pairs))
        model.add_special_tokens([end for end in ENDS if end in ids])
    except OSError as error:
        raise DataError(f"{vocabulary}: cannot read the tokenizer: {error.strerror}") from error
    except Exception as error:  # the library raises plain Exception on a foreign file
        reason = " ".join(str(error).split())
        raise DataError(f"{vocabulary}: not a vocabulary with the merges of {merges.name}: {reason}") from error
    return LibraryTokenizer(_byte_level(model))


def _byte_level(model: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Let a BPE work on bytes, as GPT-2 does."""
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    return model


def _steps(part: dict | None, inner: str) -> Iterator[dict]:
    """Yield the steps of a part of a tokenizer.json, those inside a sequence one by one."""
    for step in (part or {}).get(inner) or ([part] if part else []):
        yield from _steps(step, inner) if step.get(inner) else [step]


def _byte_symbols() -> list[str]:
    """Return the printable character that byte-level BPE writes for each byte (the table of GPT-2)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(value if value in printable else next(spare)) for value in range(256)]
