"""What a prepared corpus holds, in numbers and samples."""

from typing import Any

import numpy as np

from himoe.data.corpus import Corpus, describe
from himoe.data.shards import TokenStream
from himoe.data.tokenizer import Tokenizer

WINDOW = 4096  # tokens looked at for one sample


def inspect_corpus(corpus: Corpus, *, samples: int = 0, characters: int = 400) -> dict[str, Any]:
    """Return name, folder, tokenizer, settings, shards, and of every domain its counts and as many samples.

    Counts are of the training and the held-out part: documents, bytes of text, tokens (one of each document is its
    end), and what was left out as a duplicate.
    """
    description = describe(corpus.folder)
    shards = [
        shard
        for parts in description["domains"].values()
        for side in ("train", "held_out")
        for shard in parts[side]["shards"]
    ]
    width = np.dtype(description["dtype"]).itemsize
    domains = {}
    for name in corpus.domains:
        train, held_out = corpus.train[name], corpus.held_out[name]
        domains[name] = {
            "train": _counts(train),
            "held_out": _counts(held_out),
            "bytes_per_token": _bytes_per_token(train, held_out),
            "duplicates": description["domains"][name]["duplicates"],
        }
        if samples:
            domains[name]["samples"] = sample_texts(train, corpus.tokenizer, samples, characters)
    return {
        "name": corpus.name,
        "folder": str(corpus.folder),
        "hash": corpus.hash,
        "tokenizer": {
            "name": corpus.tokenizer.name,
            "vocab_size": corpus.tokenizer.vocab_size,
            "exact": corpus.tokenizer.exact,
            "hash": corpus.tokenizer.hash,
        },
        "settings": description["settings"],
        "shards": {"number": len(shards), "bytes": sum(shard["tokens"] for shard in shards) * width},
        "domains": domains,
    }


def sample_texts(stream: TokenStream, tokenizer: Tokenizer, number: int, characters: int) -> list[str]:
    """Return the beginnings of up to `number` documents, spread evenly over the stream."""
    texts: list[str] = []
    for start in np.linspace(0, len(stream), number, endpoint=False).astype(int).tolist():
        tokens = stream[start : start + WINDOW]
        ends = np.flatnonzero(tokens == stream.end_of_document)
        begin = int(ends[0]) + 1 if start and len(ends) else 0  # within a document longer than that there is no begin
        stop = next((int(end) for end in ends if end >= begin), len(tokens))
        if text := tokenizer.decode(tokens[begin:stop].tolist())[:characters]:
            texts.append(text)
    return texts


def _counts(stream: TokenStream) -> dict[str, int]:
    return {"documents": stream.num_documents, "bytes": stream.num_bytes, "tokens": stream.num_tokens}


def _bytes_per_token(*streams: TokenStream) -> float:
    tokens = sum(stream.num_tokens - stream.num_documents for stream in streams)
    return sum(stream.num_bytes for stream in streams) / max(1, tokens)
