import json
import pickle
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
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
    assert [either.encode(text) for text in ODD] == [list(ids) for ids in either.encode_batch(ODD)]


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
    assert list(map(list, loaded.encode_batch(SAMPLE))) == list(map(list, either.encode_batch(SAMPLE)))


def test_bytes_come_as_arrays_without_a_list_between():
    [ids] = ByteTokenizer().encode_batch(["né"])
    assert ids.dtype == np.uint8
    assert ids.tolist() == [110, 195, 169]


def test_half_a_surrogate_pair_is_refused(either):
    with pytest.raises(DataError, match="not valid Unicode at character 2"):
        either.encode("ab\ud800")


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(ConfigError, match=r"data\.vocab_size is 200; a byte-level BPE needs at least 258"):
        BPETokenizer.train(SAMPLE, 200)


PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [value for value in range(256) if value not in PRINTABLE]
# GPT-2's table: a printable byte is its own character, the others follow from 256 on.
BYTE_SYMBOLS = [chr(value if value in PRINTABLE else 256 + OTHERS.index(value)) for value in range(256)]


def gpt2_files(folder: Path, tokens: list[str], names=("encoder.json", "vocab.bpe")) -> Path:
    """A byte-level vocabulary with the merges l+o and lo+w, in GPT-2's two files."""
    (folder / names[0]).write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / names[1]).write_text("#version: 0.2\nl o\nlo w\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_the_two_files_of_gpt2_make_a_tokenizer(tmp_path, names):
    folder = gpt2_files(tmp_path, [*BYTE_SYMBOLS, "lo", "low", "<|endoftext|>"], names)
    loaded = load_tokenizer(folder)
    assert loaded.encode("low é") == [257, 32, 195, 169]
    assert loaded.exact
    assert (loaded.vocab_size, loaded.end_of_document) == (259, 258), "the end that the vocabulary has is taken"
    assert loaded.end_of_document not in loaded.encode("<|endoftext|> a<|endoftext|>")
    assert loaded.decode([*loaded.encode("<|endoftext|>"), 258]) == "<|endoftext|>"
    assert load_tokenizer(folder / names[0]).hash == loaded.hash == load_tokenizer(folder / names[1]).hash


def test_a_vocabulary_without_an_end_of_documents_gets_one_more_id(tmp_path):
    loaded = load_tokenizer(gpt2_files(tmp_path, [*BYTE_SYMBOLS, "lo", "low"]))
    assert (loaded.vocab_size, loaded.end_of_document) == (259, 258)
    assert loaded.decode([257, 258]) == "low"


def test_files_of_gpt2_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"encoder\.json: not a vocabulary with the merges of vocab\.bpe: there is no token 'low'"
    ):
        load_tokenizer(gpt2_files(tmp_path, [*BYTE_SYMBOLS, "lo"]))


GPT2 = Path(__file__).parents[3] / "shared" / "data" / "gpt2-bpe"


@pytest.mark.skipif(not GPT2.exists(), reason="GPT-2's vocabulary is not on this machine")
def test_gpt2_encodes_as_published():
    gpt2 = load_tokenizer(GPT2)
    assert (gpt2.vocab_size, gpt2.end_of_document, gpt2.exact) == (50257, 50256, True)
    assert gpt2.encode("Hello world, it's 2019.") == [15496, 995, 11, 340, 338, 13130, 13]
    assert [gpt2.decode(gpt2.encode(text)) for text in ODD] == ODD
    assert all(gpt2.byte_lengths[gpt2.encode(text)].sum() == len(text.encode()) for text in ODD)


def unigram() -> tokenizers.Tokenizer:
    model = tokenizers.Tokenizer(tokenizers.models.Unigram())
    model.normalizer = tokenizers.normalizers.NFKC()
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    model.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    model.train_from_iterator(["the lowest of the low", "newer and lower wider"] * 50, trainer)
    return model


def wordpiece() -> tokenizers.Tokenizer:
    words = ["[PAD]", "[UNK]", "[SEP]", "the", "low", "##est", "of", ","]
    model = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    model.normalizer = tokenizers.normalizers.BertNormalizer()
    model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    model.decoder = tokenizers.decoders.WordPiece()
    model.add_special_tokens(words[:3])
    model.enable_truncation(4)
    model.enable_padding(length=16)
    return model


def byte_fallback() -> tokenizers.Tokenizer:
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{value:02X}>" for value in range(256)),
        "▁",
        "l",
        "o",
        "w",
        "lo",
        "low",
        "▁low",
    ]
    merges = [("l", "o"), ("lo", "w"), ("▁", "low")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    replace = tokenizers.normalizers.Replace(" ", "▁")
    model.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"), replace])
    decoders = tokenizers.decoders
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    model.add_special_tokens(tokens[:3])
    return model


def loaded(tmp_path, model: tokenizers.Tokenizer) -> Tokenizer:
    model.save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(tmp_path)


def test_a_sentencepiece_vocabulary_with_bytes_gives_all_text_back(tmp_path):
    llama = loaded(tmp_path, byte_fallback())
    for text in ["low low", "é春", "</s>", "a</s>b <s>", "wool\n"]:
        ids = llama.encode(text)
        assert llama.decode(ids) == text
        assert llama.end_of_document not in ids
        assert llama.byte_lengths[ids].sum() == len(text.encode()) + 1, "it puts a blank in front"
    assert llama.end_of_document == 2
    assert llama.vocab_size == 266
    assert not llama.exact
    assert llama.decode([265, 2, 265]) == "low low"


def test_an_end_that_text_can_reach_is_not_taken(tmp_path):
    t5 = loaded(tmp_path, unigram())
    own = t5.model.token_to_id("</s>")
    assert own in t5.encode("a</s>"), "the model itself finds it as a word"
    assert t5.end_of_document == t5.vocab_size - 1 == t5.model.get_vocab_size()
    assert t5.decode([*t5.encode("the low"), t5.end_of_document]) == "the low"


def test_a_tokenizer_that_loses_text_says_so_and_measures_about(tmp_path):
    bert = loaded(tmp_path, wordpiece())
    ids = bert.encode("The lowest of the low, the low, the 春")
    assert len(ids) == 12, "neither cut nor padded, and nothing added"
    assert not bert.exact
    assert bert.end_of_document == 8
    assert bert.token_bytes[3:7] == [b" the", b" low", b"est", b" of"]
    assert bert.decode(ids) == "the lowest of the low, the low, the"


@pytest.mark.parametrize("make", [unigram, wordpiece, byte_fallback])
def test_any_tokenizer_is_the_same_after_saving_and_in_another_process(tmp_path, make):
    first = loaded(tmp_path, make())
    first.save(tmp_path / "again.json")
    text = "the lowest </s> [SEP] of the low"
    for other in (load_tokenizer(tmp_path / "again.json"), pickle.loads(pickle.dumps(first))):
        assert (other.hash, other.end_of_document, other.vocab_size) == (
            first.hash,
            first.end_of_document,
            first.vocab_size,
        )
        assert other.encode(text) == first.encode(text)


def test_a_pickled_tokenizer_still_takes_special_tokens_for_text(tmp_path):
    folder = gpt2_files(tmp_path, [*BYTE_SYMBOLS, "lo", "low", "<|endoftext|>"])
    sent = pickle.loads(pickle.dumps(load_tokenizer(folder)))
    assert sent.end_of_document not in sent.encode("<|endoftext|>")


def test_ids_may_have_gaps(tmp_path):
    vocabulary = {symbol: 3 * i for i, symbol in enumerate(BYTE_SYMBOLS)} | {"lo": 1000}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("l", "o")]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    gappy = loaded(tmp_path, model)
    assert (gappy.vocab_size, gappy.end_of_document) == (1002, 1001)
    assert gappy.encode("lo!") == [1000, 99]
    assert gappy.decode([1000, 1, 99]) == "lo!"
    assert gappy.byte_lengths.tolist().count(0) == 1002 - 257


def test_what_changes_text_before_the_bytes_is_not_exact(tmp_path):
    for change in ("normalizer", "prefix", "removed"):
        model = tokenizers.Tokenizer.from_str(tokenizer("bpe").to_json())
        assert loaded(tmp_path, model).exact
        if change == "normalizer":
            model.normalizer = tokenizers.normalizers.NFC()
        elif change == "prefix":
            model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
        else:
            steps = [tokenizers.pre_tokenizers.Split(" ", "removed"), tokenizers.pre_tokenizers.ByteLevel(False)]
            model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
        assert not loaded(tmp_path, model).exact


def test_merges_left_out_at_random_are_switched_off(tmp_path):
    spec = json.loads(tokenizer("bpe").to_json())
    spec["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    loaded = load_tokenizer(tmp_path)
    assert {tuple(loaded.encode("the lowest")) for _ in range(20)} == {tuple(tokenizer("bpe").encode("the lowest"))}


def test_a_vocabulary_without_a_token_for_what_it_does_not_know_is_refused_when_it_meets_some(tmp_path):
    words = loaded(tmp_path, tokenizers.Tokenizer(tokenizers.models.WordLevel({"low": 0}, unk_token="?")))
    assert words.encode("low") == [0]
    with pytest.raises(DataError, match=r"the tokenizer cannot encode this text: .*; give another data.tokenizer"):
        words.encode("high")


@pytest.mark.parametrize("content", ["", "not json", "[]", "{}", '"text"', '{"model": {"type": "BPE"}}'])
def test_a_foreign_tokenizer_file_is_refused(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer\.json: ") as caught:
        load_tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(
            DataError, match=r"cannot read the tokenizer: No such file.*; give a tokenizer.json, or a folder"
        ):
            load_tokenizer(path)
