"""A memory-mapped file of token ids with its description beside it.

`NAME.tokens` holds the ids, little-endian, 2 bytes each while the vocabulary fits, else 4, every document followed by
the end-of-document id. `NAME.json` says how many there are and their SHA-256, so that a damaged file is noticed.
"""

import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from himoe.data.tokenizer import Tokenizer
from himoe.errors import DataError

FORMAT = 1


class TokenFile:
    """Token ids of one text, `tokens (num_tokens,)`, read from disk as they are used.

    Opening checks size and hash and raises `DataError` where they differ from what was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            meta = json.loads(self.path.with_suffix(".json").read_text(encoding="utf-8"))
            if meta["format"] != FORMAT:
                raise DataError(f"{self.path}: token file format {meta['format']}, this version reads {FORMAT}")
            self.num_tokens, self.num_bytes = int(meta["num_tokens"]), int(meta["num_bytes"])
            self.end_of_document = int(meta["end_of_document"])
            dtype = np.dtype(meta["dtype"])
            size = self.path.stat().st_size
            if size != self.num_tokens * dtype.itemsize:
                raise DataError(f"{self.path}: {size} bytes, expected {self.num_tokens * dtype.itemsize}; truncated?")
            self.tokens = np.memmap(self.path, dtype=dtype, mode="r")
            found = hashlib.sha256(self.tokens.data).hexdigest()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path}: not a readable token file: {error}; prepare the data again") from error
        if found != meta["sha256"]:
            raise DataError(f"{self.path}: content differs from its recorded hash; prepare the data again")

    @functools.cached_property
    def document_starts(self) -> np.ndarray:
        """Index of the first token of every document, `(documents,)` int64."""
        ends = np.flatnonzero(self.tokens == self.end_of_document)
        return np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)


def write_token_file(path: Path, batches: Iterable[list[str]], tokenizer: Tokenizer) -> None:
    """Encode batches of documents and write them under a temporary name, renamed when complete."""
    path = Path(path)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    digest, num_tokens, num_bytes = hashlib.sha256(), 0, 0
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        for batch in batches:
            num_bytes += sum(len(document.encode()) for document in batch)
            for ids in tokenizer.encode_batch(batch):
                content = np.array([*ids, tokenizer.end_of_document], dtype=dtype).tobytes()
                digest.update(content)
                file.write(content)
                num_tokens += len(ids) + 1
    meta = {
        "format": FORMAT,
        "dtype": dtype.str,
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
        "end_of_document": tokenizer.end_of_document,
        "sha256": digest.hexdigest(),
    }
    path.with_suffix(".json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    partial.replace(path)
