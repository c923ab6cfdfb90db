import json
import math

import numpy as np
import pytest

from himoe.data import BPETokenizer, ByteTokenizer, TokenStream, ngram, ngram_baselines, prepare


def counts(documents, tokenizer, **how):
    parts = [[*ids, tokenizer.end_of_document] for ids in tokenizer.encode_batch(documents)]
    return ngram.pair_counts(TokenStream.of(*parts, end_of_document=tokenizer.end_of_document), tokenizer, **how)


def test_hand_worked_values():
    train = counts(["aab", "ba"], ByteTokenizer())
    held_out = counts(["ab"], ByteTokenizer())
    # a 3 times and b 2 of 5 bytes; a begins 1 of 2 documents; after a: a 1, b 1, nothing else
    scores = ngram.score(train, held_out)
    assert scores["unigram"] == pytest.approx(-(math.log2(4 / 261) + math.log2(3 / 261)) / 2)
    assert scores["bigram"] == pytest.approx(-(math.log2(2 / 258) + math.log2(2 / 258)) / 2)


def test_unseen_text_costs_at_most_eight_bits_for_want_of_counts():
    train = counts(["b"], ByteTokenizer())
    held_out = counts(["xyz"], ByteTokenizer())
    assert ngram.score(train, held_out)["bigram"] == pytest.approx((math.log2(257) + 8 + 8) / 3)


def test_counts_depend_on_the_bytes_not_on_the_tokens(text, monkeypatch):
    documents = [text(3000, seed=i) for i in range(4)]
    bpe = BPETokenizer.train(documents, 400)
    expected = counts(documents, ByteTokenizer())
    assert np.array_equal(counts(documents, bpe), expected)
    assert expected.sum() == sum(len(document.encode()) for document in documents)
    monkeypatch.setattr(ngram, "STRETCH", 100)
    assert np.array_equal(counts(documents, bpe), expected)


def test_of_a_large_text_every_kth_stretch_counts_by_hand(monkeypatch):
    monkeypatch.setattr(ngram, "STRETCH", 4)
    found = counts(["abcd", "abab", "zz"], ByteTokenizer(), every=2)  # of abcd|.aba|b.zz|. the 1st and 3rd
    expected = np.zeros((257, 256), dtype=int)
    a, b, c, d, z = b"abcdz"
    for context, byte in [(ngram.START, a), (a, b), (b, c), (c, d), (ngram.START, z), (z, z)]:
        expected[context, byte] += 1
    assert np.array_equal(found, expected)


def test_a_sample_comes_close_to_the_whole(two_domains, monkeypatch):
    corpus = prepare(two_domains, tokenizer="byte", held_out=0.2)
    whole = ngram_baselines(corpus)
    (corpus.folder / ngram.FILE).unlink()
    monkeypatch.setattr(ngram, "STRETCH", 500)
    monkeypatch.setattr(ngram, "LIMIT", 15_000)
    read = []
    of = TokenStream.__getitem__
    monkeypatch.setattr(TokenStream, "__getitem__", lambda stream, part: read.append(1) or of(stream, part))
    sampled = ngram_baselines(corpus)
    assert len(read) * 500 < 2 * 15_000 + 4 * 500
    for domain, scores in whole.items():
        assert sampled[domain]["unigram"] == pytest.approx(scores["unigram"], rel=0.03)
        assert scores["bigram"] < sampled[domain]["bigram"] < 1.3 * scores["bigram"]  # fewer pairs met


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
