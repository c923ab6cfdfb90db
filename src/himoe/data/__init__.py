"""Text in, tokens out: sources, held-out split, tokenizers, token shards, training order and n-gram baselines."""

from himoe.data.corpus import Corpus, cache_folder, verify
from himoe.data.ngram import ngram_baselines
from himoe.data.order import TrainingOrder
from himoe.data.preparation import prepare
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
