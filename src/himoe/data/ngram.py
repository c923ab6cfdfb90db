"""Byte-unigram and byte-bigram models, the yardstick that a trained model's bits per byte are read against.

Counts come from the training part, all domains together, with one added to each of the 256 byte values:
p(b) = (n_b + 1) / (n + 256) and p(b | a) = (n_ab + 1) / (n_a + 256). Every document stands alone: the context of its
first byte is a start symbol, a 257th context that only begins documents.

Of a large corpus every k-th stretch of `STRETCH` tokens is counted, with the least k that leaves at most `LIMIT` tokens
of all training parts, and likewise of each held-out part.
"""

import contextlib
import json
import math
from collections.abc import Iterator

import numpy as np

from himoe.data.corpus import Corpus
from himoe.data.shards import TokenStream
from himoe.data.tokenizer import Tokenizer
from himoe.files import write_json

START = 256
FILE = "ngrams.json"
STRETCH = 2**18  # tokens turned back into bytes at a time
LIMIT = 2**26  # tokens read at most, about: seconds of work


def ngram_baselines(corpus: Corpus) -> dict[str, dict[str, float]]:
    """Return `{domain: {"unigram": …, "bigram": …}}` in bits per held-out byte, kept beside the corpus."""
    cache = corpus.folder / FILE
    with contextlib.suppress(OSError, ValueError):
        return json.loads(cache.read_text(encoding="utf-8"))
    every = _thinning(sum(map(len, corpus.train.values())))
    counts = np.zeros((257, 256), dtype=np.int64)
    for stream in corpus.train.values():
        counts += pair_counts(stream, corpus.tokenizer, every=every)
    scores = {}
    for domain, stream in corpus.held_out.items():
        scores[domain] = score(counts, pair_counts(stream, corpus.tokenizer, every=_thinning(len(stream))))
    with contextlib.suppress(OSError):  # only saves time the next time
        write_json(cache, scores)
    return scores


def pair_counts(stream: TokenStream, tokenizer: Tokenizer, *, every: int = 1) -> np.ndarray:
    """Count each (context, byte) of a stream's text, `(257, 256)` int64; context 256 begins a document.

    With `every` above 1 only each such stretch is read; its first byte, whose context is not known, is left out.
    """
    counts = np.zeros((257, 257), dtype=np.int64)
    last = np.array([START])
    for symbols in _symbols(stream, tokenizer, every):
        context = np.concatenate([last, symbols[:-1]])
        counts += np.bincount(context * 257 + symbols[-len(context) :], minlength=257 * 257).reshape(257, 257)
        last = symbols[-1:] if every == 1 else symbols[:0]
    return counts[:, :256]


def _thinning(tokens: int) -> int:
    return max(1, math.ceil(tokens / LIMIT))


def score(train: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
    """Return the mean bits per byte of `held_out` pairs under models fitted on `train` pairs, both `(257, 256)`."""
    unigram = train.sum(0) + 1.0
    bigram = train + 1.0
    total = held_out.sum() * math.log(2)
    return {
        "unigram": float(-(held_out.sum(0) * np.log(unigram / unigram.sum())).sum() / total),
        "bigram": float(-(held_out * np.log(bigram / bigram.sum(1, keepdims=True))).sum() / total),
    }


def _symbols(stream: TokenStream, tokenizer: Tokenizer, every: int) -> Iterator[np.ndarray]:
    """Yield the text of each `every`-th stretch as int64 bytes, each end of a document as the next one's start."""
    strings = [np.frombuffer(token, dtype=np.uint8).astype(np.int64) for token in tokenizer.token_bytes]
    strings[tokenizer.end_of_document] = np.array([START])
    lengths = np.array([len(string) for string in strings])
    offsets = np.cumsum(lengths) - lengths
    table = np.concatenate(strings)
    for begin in range(0, len(stream), STRETCH * every):
        tokens = stream[begin : begin + STRETCH].astype(np.int64)
        size = lengths[tokens]
        skipped = offsets[tokens] - (np.cumsum(size) - size)
        if size.any():
            yield table[np.repeat(skipped, size) + np.arange(size.sum())]
