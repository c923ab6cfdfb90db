"""Byte-unigram and byte-bigram models, the yardstick that a trained model's bits per byte are read against.

Counts come from the training part, all domains together, with one added to each of the 256 byte values:
p(b) = (n_b + 1) / (n + 256) and p(b | a) = (n_ab + 1) / (n_a + 256). Every document stands alone: the context of its
first byte is a start symbol, a 257th context that only begins documents.
"""

import contextlib
import json
import math
from collections.abc import Iterator

import numpy as np

from himoe.data.corpus import Corpus
from himoe.data.shards import TokenStream
from himoe.data.tokenizer import Tokenizer

START = 256
FILE = "ngrams.json"
BATCH = 2**20  # tokens turned back into bytes at a time


def ngram_baselines(corpus: Corpus) -> dict[str, dict[str, float]]:
    """Return `{domain: {"unigram": …, "bigram": …}}` in bits per held-out byte, kept beside the corpus."""
    cache = corpus.folder / FILE
    with contextlib.suppress(OSError, ValueError):
        return json.loads(cache.read_text(encoding="utf-8"))
    counts = np.sum([pair_counts(stream, corpus.tokenizer) for stream in corpus.train.values()], axis=0)
    scores = {
        domain: score(counts, pair_counts(stream, corpus.tokenizer)) for domain, stream in corpus.held_out.items()
    }
    with contextlib.suppress(OSError):  # only saves a second the next time
        partial = cache.with_suffix(".partial")
        partial.write_text(json.dumps(scores), encoding="utf-8")
        partial.replace(cache)
    return scores


def pair_counts(stream: TokenStream, tokenizer: Tokenizer) -> np.ndarray:
    """Count each (context, byte) of a stream's text, `(257, 256)` int64; context 256 begins a document."""
    counts = np.zeros((257, 257), dtype=np.int64)
    last = START
    for symbols in _symbols(stream, tokenizer):
        context = np.concatenate([[last], symbols[:-1]])
        counts += np.bincount(context * 257 + symbols, minlength=257 * 257).reshape(257, 257)
        last = int(symbols[-1])
    return counts[:, :256]


def score(train: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
    """Return the mean bits per byte of `held_out` pairs under models fitted on `train` pairs, both `(257, 256)`."""
    unigram = train.sum(0) + 1.0
    bigram = train + 1.0
    total = held_out.sum() * math.log(2)
    return {
        "unigram": float(-(held_out.sum(0) * np.log(unigram / unigram.sum())).sum() / total),
        "bigram": float(-(held_out * np.log(bigram / bigram.sum(1, keepdims=True))).sum() / total),
    }


def _symbols(stream: TokenStream, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yield the text in batches of int64 bytes, each end of a document as the start symbol of the next."""
    strings = [np.frombuffer(token, dtype=np.uint8).astype(np.int64) for token in tokenizer.token_bytes]
    strings[tokenizer.end_of_document] = np.array([START])
    lengths = np.array([len(string) for string in strings])
    offsets = np.cumsum(lengths) - lengths
    table = np.concatenate(strings)
    for chunk in stream.chunks(BATCH):
        tokens = chunk.astype(np.int64)
        size = lengths[tokens]
        skipped = offsets[tokens] - (np.cumsum(size) - size)
        yield table[np.repeat(skipped, size) + np.arange(size.sum())]
