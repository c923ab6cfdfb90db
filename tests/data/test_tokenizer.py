import json
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from himoe.data import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from himoe.errors import ConfigError, DataError

SAMPLE = [
    "def lower(word):\n    return word.lower()\n\n",
    "Größe und Maß, 春眠不覺曉 處處聞啼鳥\r\n",
    "the lowest of the low, the newest of the new. " * 20,
]
ODD = [
    "",
    " ",
    "\n\n\t",
    "\0",
    "\ufeff",
    "e\u0301",
    "👩‍👩‍👧",
    "\u2028",
    "\U0010ffff",
    "<|endoftext|>",
    "  a  b ",
    "\x7f\x80\xad",
]


@cache
def tokenizer(name: str) -> Tokenizer:
    return ByteTokenizer() if name == "byte" else BPETokenizer.train(SAMPLE, 400)


@pytest.fixture(params=["byte", "bpe"])
def either(request) -> Tokenizer:
    return tokenizer(request.param)


@given(st.text(), st.sampled_from(["byte", "bpe"]))
def test_any_text_survives_the_round_trip(text, name):
    either = tokenizer(name)
    ids = either.encode(text)
    assert either.decode(ids) == text
    assert either.end_of_document not in ids
    assert either.byte_lengths[ids].sum() == len(text.encode())


def test_odd_text_survives_the_round_trip(either):
    assert [either.decode(ids) for ids in either.encode_batch(ODD)] == ODD
    assert [either.encode(text) for text in ODD] == either.encode_batch(ODD)


def test_ids_are_numbered_through_and_the_last_ends_a_document(either):
    assert either.end_of_document == either.vocab_size - 1
    assert len(either.token_bytes) == len(either.byte_lengths) == either.vocab_size
    assert sorted(either.token_bytes)[0] == b"" == either.token_bytes[either.end_of_document]
    assert {bytes([value]) for value in range(256)} <= set(either.token_bytes)
    assert either.decode([either.end_of_document]) == ""


def test_bpe_learns_frequent_pieces_and_shortens_text():
    bpe = tokenizer("bpe")
    assert b" lowest" in bpe.token_bytes
    assert len(bpe.encode(SAMPLE[2])) < len(SAMPLE[2]) / 3


def test_bpe_decodes_as_the_library_does():
    bpe = tokenizer("bpe")
    ids = bpe.encode("Größe: 春眠, the lowest\n")
    assert bpe.model.decode(ids) == bpe.decode(ids)


def test_a_broken_character_becomes_the_replacement_character(either):
    assert either.decode(either.encode("é")[:1]) in ("é", "\ufffd")
    assert ByteTokenizer().decode([195]) == "\ufffd"


def test_training_twice_gives_the_same_tokenizer():
    again = BPETokenizer.train(list(SAMPLE), 400)
    assert again.hash == tokenizer("bpe").hash
    assert BPETokenizer.train(SAMPLE, 270).hash != again.hash


def test_a_short_text_gives_a_smaller_vocabulary():
    assert BPETokenizer.train(["abab"] * 3, 4096).vocab_size < 270


def test_saved_and_loaded_it_is_the_same(either, tmp_path):
    either.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert (loaded.name, loaded.hash, loaded.vocab_size) == (either.name, either.hash, either.vocab_size)
    assert loaded.encode_batch(SAMPLE) == either.encode_batch(SAMPLE)


def test_half_a_surrogate_pair_is_refused(either):
    with pytest.raises(DataError, match="not valid Unicode at character 2"):
        either.encode("ab\ud800")


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(ConfigError, match=r"data\.vocab_size is 200; a byte-level BPE needs at least 258"):
        BPETokenizer.train(SAMPLE, 200)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not json",
        "[]",
        "{}",
        json.dumps({"model": {"type": "WordLevel", "vocab": {"é": 0, "—": 1}, "unk_token": "é"}}),
    ],
)
def test_a_foreign_tokenizer_file_is_refused(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer\.json of a byte or byte-level BPE"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_missing_tokenizer_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot read the tokenizer: No such file"):
        load_tokenizer(tmp_path / "tokenizer.json")
