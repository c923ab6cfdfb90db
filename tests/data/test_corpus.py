import random
import resource
import signal
from pathlib import Path

import numpy as np
import pytest

from himoe.data import BPETokenizer, Corpus, cache_folder, prepare
from himoe.data import corpus as corpus_module
from himoe.data.sources import read_source
from himoe.errors import ConfigError, DataError


def documents(corpus: Corpus, domain: str | None = None) -> list[str]:
    file = corpus.held_out[domain] if domain else corpus.train
    return [corpus.tokenizer.decode(ids[:-1]) for ids in np.split(file.tokens, file.document_starts[1:])]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(params=["byte", "bpe"])
def spec(request) -> dict:
    return {"tokenizer": request.param, "vocab_size": 300, "held_out": 0.2}


@pytest.fixture
def no_build(monkeypatch):
    """Make any new preparation fail."""

    def refuse(*_):
        raise AssertionError("prepared anew")

    return lambda: monkeypatch.setattr("himoe.data.corpus._build", refuse)


def test_a_corpus_holds_every_document_once_on_one_side(two_domains, spec):
    corpus = prepare(two_domains, **spec)
    assert corpus.name == "text"
    assert corpus.domains == list(corpus.held_out) == ["letters", "verse"]
    held_out = [document for domain in corpus.domains for document in documents(corpus, domain)]
    train = documents(corpus)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(
        part for domain in read_source(two_domains).load().values() for part in domain
    )


def test_sizes_are_those_of_the_text(two_domains, spec):
    corpus = prepare(two_domains, **spec)
    for file in (corpus.train, *corpus.held_out.values()):
        assert file.num_bytes == corpus.tokenizer.byte_lengths[file.tokens].sum() > 0
        assert file.num_tokens == len(file.tokens)
        assert len(file.document_starts) == (file.tokens == corpus.tokenizer.end_of_document).sum()


def test_the_second_time_it_is_opened_not_prepared(two_domains, spec, no_build):
    first = prepare(two_domains, **spec)
    no_build()
    second = prepare(two_domains, **spec)
    assert (second.hash, second.tokenizer.hash) == (first.hash, first.tokenizer.hash)
    assert second.train.tokens.tolist() == first.train.tokens.tolist()


def test_the_same_text_elsewhere_is_found_again_under_its_own_name(two_domains, spec, no_build):
    first = prepare(two_domains, **spec)
    no_build()
    moved = prepare(two_domains.rename(two_domains.with_name("moved")), **spec)
    assert (moved.hash, moved.name) == (first.hash, "moved")


def test_two_preparations_are_equal_byte_for_byte(two_domains, spec, tmp_path):
    first, second = (prepare(two_domains, **spec, cache=tmp_path / name) for name in ("a", "b"))
    assert contents(first.folder) == contents(second.folder)
    assert first.hash == second.hash


def test_the_hash_follows_text_names_tokenizer_and_split(two_domains, spec):
    corpora = [
        prepare(two_domains, **spec),
        prepare(two_domains, **spec | {"held_out": 0.3}),
        prepare(two_domains, **spec | {"tokenizer": "byte" if spec["tokenizer"] == "bpe" else "bpe"}),
        prepare(two_domains, **spec | {"vocab_size": 310}) if spec["tokenizer"] == "bpe" else None,
    ]
    (two_domains / "letters.md").rename(two_domains / "notes.md")
    corpora.append(prepare(two_domains, **spec))
    with (two_domains / "notes.md").open("a", encoding="utf-8") as file:
        file.write("one more line\n")
    corpora.append(prepare(two_domains, **spec))
    hashes = [corpus.hash for corpus in corpora if corpus]
    assert len(set(hashes)) == len(hashes)


def test_the_tokenizer_learns_from_the_training_part_only(two_domains, monkeypatch):
    seen = []
    train = BPETokenizer.train
    monkeypatch.setattr(BPETokenizer, "train", lambda texts, size: seen.extend(texts) or train(seen, size))
    corpus = prepare(two_domains, vocab_size=300, held_out=0.2)
    assert sorted(seen) == sorted(documents(corpus))


def test_of_a_large_text_the_tokenizer_learns_from_a_sample_of_every_domain(two_domains, monkeypatch):
    seen = []
    train = BPETokenizer.train
    monkeypatch.setattr(BPETokenizer, "train", lambda texts, size: seen.extend(texts) or train(seen, size))
    monkeypatch.setattr("himoe.data.corpus.BPE_SAMPLE", 12_000)
    prepare(two_domains, vocab_size=300, held_out=0.2)
    sizes = [
        sum(len(text) for text in seen if text in domain)
        for domain in map(str, read_source(two_domains).load().values())
    ]
    assert 12_000 <= sum(len(text.encode()) for text in seen) < 16_000
    assert all(size == 0 or size > 5000 for size in sizes)


@pytest.mark.parametrize("name", ["tokenizer.json", "corpus.json", "train.tokens", "train.json", "held_out_1.tokens"])
@pytest.mark.parametrize("damage", ["delete", "truncate", "change"])
def test_a_damaged_cache_is_prepared_again(two_domains, spec, name, damage):
    intact = prepare(two_domains, **spec)
    before = contents(intact.folder)
    file = intact.folder / name
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(before[name][:-3] + (b"" if damage == "truncate" else b"xyz"))
    assert prepare(two_domains, **spec).hash == intact.hash
    assert contents(intact.folder) == before


def test_of_two_processes_at_the_same_text_the_second_takes_what_the_first_made(two_domains, spec, monkeypatch):
    quicker, build = [], corpus_module._build

    def overtaken(*arguments):
        monkeypatch.setattr("himoe.data.corpus._build", build)
        quicker.append(prepare(two_domains, **spec))
        (quicker[0].folder / "ngrams.json").write_text("in use", encoding="utf-8")
        build(*arguments)

    monkeypatch.setattr("himoe.data.corpus._build", overtaken)
    slower = prepare(two_domains, **spec)
    assert slower.hash == quicker[0].hash and slower.folder == quicker[0].folder
    assert (slower.folder / "ngrams.json").read_text(encoding="utf-8") == "in use"
    assert [path.name for path in slower.folder.parent.iterdir()] == [slower.folder.name]


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    assert cache_folder() != tmp_path / "named"
    monkeypatch.setenv("HIMOE_CACHE", str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named"
    monkeypatch.delenv("HIMOE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "himoe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "himoe"


def test_a_cache_that_cannot_be_written_is_named_with_the_variable(two_domains, tmp_path):
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    with pytest.raises(DataError, match=r"file/corpora: cannot keep the prepared data there: Not a dir.*HIMOE_CACHE"):
        prepare(two_domains, cache=tmp_path / "file")


@pytest.mark.parametrize("limit", [100, 10_000])
def test_a_full_disk_leaves_nothing_half_written(two_domains, spec, cache, limit):
    """A limit on the size of files stands for the full disk: writes fail in the middle, the same way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(DataError, match="cannot keep the prepared data there: File too large; free some space"):
            prepare(two_domains, **spec)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list((cache / "corpora").iterdir()) == []
    assert prepare(two_domains, **spec).train.num_tokens > 0


def test_an_interrupted_preparation_leaves_nothing_half_written(two_domains, spec, cache):
    def interrupt(stage, _done):
        if stage == "encode":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(two_domains, **spec, progress=interrupt)
    assert list((cache / "corpora").iterdir()) == []


def test_progress_is_reported_in_order(two_domains, spec, monkeypatch):
    monkeypatch.setattr("himoe.data.corpus.BATCH", 3000)
    told = []
    prepare(two_domains, **spec, progress=lambda stage, done: told.append((stage, done)))
    assert list(dict.fromkeys(stage for stage, _ in told)) == ["read", "tokenizer", "encode"]
    shares = [done for stage, done in told if stage == "encode"]
    assert shares == sorted(set(shares))
    assert len(shares) > 5
    assert shares[0] == 0
    assert shares[-1] < 1


def test_text_too_short_to_split_names_the_domain(tmp_path):
    for name in ("poem", "story"):
        (tmp_path / f"{name}.txt").write_text("Rose is a rose.\n", encoding="utf-8")
    with pytest.raises(DataError, match=r", domain poem: too short to hold a part out, it has one document only; give"):
        prepare(tmp_path)


def test_a_small_file_is_enough(tmp_path, text):
    (tmp_path / "note.txt").write_text(text(4000), encoding="utf-8")
    corpus = prepare(tmp_path / "note.txt", tokenizer="byte", held_out=0.1)
    assert corpus.held_out["note"].num_bytes > 0
    assert corpus.train.num_bytes > 3000


def test_an_unknown_tokenizer_is_refused(two_domains):
    with pytest.raises(ConfigError, match=r"data\.tokenizer is 'word'; allowed are 'bpe' and 'byte'"):
        prepare(two_domains, tokenizer="word")


def test_random_documents_never_change_sides_as_a_folder_grows(two_domains, text):
    choose = random.Random(4)
    held_out = set(documents(prepare(two_domains, tokenizer="byte", held_out=0.3), "verse"))
    for i in range(3):
        (two_domains / "verse" / f"{choose.random()}.txt").write_text(text(500, seed=1000 + i), encoding="utf-8")
        grown = prepare(two_domains, tokenizer="byte", held_out=0.3)
        assert held_out <= set(documents(grown, "verse"))
        assert not held_out & set(documents(grown))


SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(not SHARED.exists(), reason="the experiments' data folder ../shared/data is not here")
def test_one_long_file_gets_a_sensible_held_out_part():
    corpus = prepare(SHARED / "tinyshakespeare" / "input.txt", vocab_size=512)
    share = corpus.held_out["input"].num_bytes / 1_115_394
    assert 0.02 < share < 0.12
