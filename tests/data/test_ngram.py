import json
import math

import numpy as np
import pytest

from himoe.data import BPETokenizer, ByteTokenizer, TokenFile, ngram, ngram_baselines, prepare
from himoe.data.token_file import write_token_file


def counts(tmp_path, documents, tokenizer):
    write_token_file(tmp_path / "some.tokens", [documents], tokenizer)
    return ngram.pair_counts(TokenFile(tmp_path / "some.tokens"), tokenizer)


def test_hand_worked_values(tmp_path):
    train = counts(tmp_path, ["aab", "ba"], ByteTokenizer())
    held_out = counts(tmp_path, ["ab"], ByteTokenizer())
    # a 3 times and b 2 of 5 bytes; a begins 1 of 2 documents; after a: a 1, b 1, nothing else
    scores = ngram.score(train, held_out)
    assert scores["unigram"] == pytest.approx(-(math.log2(4 / 261) + math.log2(3 / 261)) / 2)
    assert scores["bigram"] == pytest.approx(-(math.log2(2 / 258) + math.log2(2 / 258)) / 2)


def test_unseen_text_costs_at_most_eight_bits_for_want_of_counts(tmp_path):
    train = counts(tmp_path, ["b"], ByteTokenizer())
    held_out = counts(tmp_path, ["xyz"], ByteTokenizer())
    assert ngram.score(train, held_out)["bigram"] == pytest.approx((math.log2(257) + 8 + 8) / 3)


def test_counts_depend_on_the_bytes_not_on_the_tokens(tmp_path, text, monkeypatch):
    documents = [text(3000, seed=i) for i in range(4)]
    bpe = BPETokenizer.train(documents, 400)
    expected = counts(tmp_path, documents, ByteTokenizer())
    assert np.array_equal(counts(tmp_path, documents, bpe), expected)
    assert expected.sum() == sum(len(document.encode()) for document in documents)
    monkeypatch.setattr(ngram, "BATCH", 100)
    assert np.array_equal(counts(tmp_path, documents, bpe), expected)


def test_baselines_are_kept_beside_the_corpus(two_domains, monkeypatch):
    corpus = prepare(two_domains, tokenizer="byte", held_out=0.2)
    scores = ngram_baselines(corpus)
    assert list(scores) == ["letters", "verse"]
    assert all(1 < score["bigram"] < score["unigram"] < 8 for score in scores.values())
    monkeypatch.setattr(ngram, "pair_counts", None)
    assert ngram_baselines(corpus) == scores
    (corpus.folder / ngram.FILE).write_text(json.dumps(scores)[:20], encoding="utf-8")
    monkeypatch.undo()
    assert ngram_baselines(corpus) == scores
