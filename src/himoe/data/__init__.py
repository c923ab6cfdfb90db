"""Text in, tokens out: how text is read (`text`), prepared (`preparation`), and what a prepared corpus is.

A corpus has a tokenizer, token shards, a training order, and n-gram baselines to read a model's results against.
"""

from himoe.data.corpus import Corpus, cache_folder, verify
from himoe.data.ngram import ngram_baselines
from himoe.data.order import TrainingOrder
from himoe.data.preparation.prepare import prepare
from himoe.data.shards import TokenStream
from himoe.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "Corpus",
    "TokenStream",
    "Tokenizer",
    "TrainingOrder",
    "cache_folder",
    "load_tokenizer",
    "ngram_baselines",
    "prepare",
    "verify",
]
