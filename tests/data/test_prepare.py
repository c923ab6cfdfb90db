import json
import random
from pathlib import Path

import pytest
from corpus_case import all_documents, contents, documents_of, source_documents

from himoe.data import BPETokenizer, cache_folder, prepare
from himoe.data.preparation import choice, writing
from himoe.data.preparation import prepare as preparation
from himoe.data.preparation.split import digest
from himoe.errors import ConfigError, DataError

SITES = {"a": [0, 1, 2, 3, 4, 5, 6, 7, 8], "b": [4, 20, 21, 22, 23, 24, 6, 0, 8]}  # documents by number


@pytest.fixture
def no_build(monkeypatch):
    """Make any new preparation fail."""

    def refuse(*_):
        raise AssertionError("prepared anew")

    return lambda: monkeypatch.setattr(preparation, "build", refuse)


def test_a_corpus_holds_every_document_once_on_one_side(two_domains, spec):
    corpus = prepare(two_domains, **spec)
    assert corpus.name == "text"
    assert corpus.domains == list(corpus.train) == list(corpus.held_out) == ["letters", "verse"]
    train, held_out = all_documents(corpus, "train"), all_documents(corpus, "held_out")
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(source_documents(two_domains))


def test_documents_keep_their_order_and_counts_are_those_of_the_text(two_domains, spec, small_units):
    corpus = prepare(two_domains, **spec)
    for side in (corpus.train, corpus.held_out):
        for stream in side.values():
            texts = documents_of(stream, corpus.tokenizer)
            assert (stream.num_documents, stream.num_tokens) == (len(texts), len(stream))
            assert stream.num_bytes == sum(len(text.encode()) for text in texts) > 0
            places = list(map(source_documents(two_domains).index, texts))
            assert places == sorted(places)


def test_the_second_time_no_text_is_read(two_domains, spec, no_build, monkeypatch):
    first = prepare(two_domains, **spec)
    no_build()
    monkeypatch.setattr(preparation, "scan_source", None)
    second = prepare(two_domains, **spec)
    assert (second.hash, second.tokenizer.hash) == (first.hash, first.tokenizer.hash)
    assert all_documents(second, "train") == all_documents(first, "train")


def test_the_same_text_elsewhere_is_found_again_under_its_own_name(two_domains, spec, no_build):
    first = prepare(two_domains, **spec)
    no_build()
    moved = prepare(two_domains.rename(two_domains.with_name("moved")), **spec)
    assert (moved.hash, moved.name) == (first.hash, "moved")


def test_the_same_text_in_other_files_is_the_same_corpus(two_domains, tmp_path, no_build):
    first = prepare(two_domains, tokenizer="byte", held_out=0.2)
    no_build()
    renamed = two_domains / "verse" / "9.txt"
    renamed.rename(renamed.with_name("99.txt"))
    assert prepare(two_domains, tokenizer="byte", held_out=0.2).hash == first.hash


def test_the_hash_follows_text_names_tokenizer_and_split(two_domains, spec):
    other = "byte" if spec["tokenizer"] == "bpe" else "bpe"
    corpora = [prepare(two_domains, **spec | change) for change in ({}, {"held_out": 0.3}, {"tokenizer": other})]
    corpora += [prepare(two_domains, **spec, deduplicate=True)]
    corpora += [prepare(two_domains, **spec | {"vocab_size": 310})] if other == "byte" else []
    (two_domains / "letters.md").rename(two_domains / "notes.md")
    corpora.append(prepare(two_domains, **spec))
    with (two_domains / "notes.md").open("a", encoding="utf-8") as file:
        file.write("one more line\n")
    corpora.append(prepare(two_domains, **spec))
    hashes = [corpus.hash for corpus in corpora]
    assert len(set(hashes)) == len(hashes)


def test_several_sources_are_domains_of_the_given_names(two_domains):
    sources = {"poems": two_domains / "verse", "mail": two_domains / "letters.md"}
    corpus = prepare(sources=sources, tokenizer="byte", held_out=0.2)
    assert corpus.domains == ["poems", "mail"]
    sizes = [corpus.train[name].num_bytes + corpus.held_out[name].num_bytes for name in corpus.domains]
    files = [sorted((two_domains / "verse").iterdir()), [two_domains / "letters.md"]]
    assert sizes == [sum(file.stat().st_size for file in domain) for domain in files]
    assert documents_of(corpus.train["poems"], corpus.tokenizer)[0] in (two_domains / "verse/0.txt").read_text("utf-8")
    with pytest.raises(ConfigError, match=r"data\.sources names paths and domains; leave data\.path out"):
        prepare(two_domains, sources=sources)


def learned_from(monkeypatch) -> list[str]:
    seen = []
    train = BPETokenizer.train
    monkeypatch.setattr(BPETokenizer, "train", lambda texts, size: seen.extend(texts) or train(seen, size))
    return seen


def test_the_tokenizer_learns_from_the_training_part_only(two_domains, monkeypatch, small_units):
    seen = learned_from(monkeypatch)
    corpus = prepare(two_domains, vocab_size=300, held_out=0.2, workers=1)
    assert sorted(seen) == sorted(all_documents(corpus, "train"))


def test_the_tokenizer_meets_repeated_documents_once(two_domains, monkeypatch):
    (two_domains / "verse" / "again.txt").write_bytes((two_domains / "verse" / "0.txt").read_bytes())
    seen = learned_from(monkeypatch)
    corpus = prepare(two_domains, vocab_size=300, held_out=0.2)
    assert sorted(seen) == sorted(set(all_documents(corpus, "train")))


def test_of_a_large_text_the_tokenizer_learns_from_a_sample_of_every_domain(two_domains, monkeypatch):
    seen = learned_from(monkeypatch)
    monkeypatch.setattr(choice, "BPE_SAMPLE", 12_000)
    corpus = prepare(two_domains, vocab_size=300, held_out=0.2)
    for stream in corpus.train.values():
        size = sum(len(text.encode()) for text in documents_of(stream, corpus.tokenizer) if text in seen)
        assert 6000 <= size < 8500


def test_a_tokenizer_of_ones_own_is_used_as_it_is(two_domains, tmp_path):
    BPETokenizer.train(["another text, on other things"], 280).save(tmp_path / "own.json")
    corpus = prepare(two_domains, tokenizer=tmp_path / "own.json", held_out=0.2)
    assert corpus.tokenizer.to_json() == (tmp_path / "own.json").read_text(encoding="utf-8")
    assert prepare(two_domains, tokenizer=str(tmp_path / "own.json"), held_out=0.2).folder == corpus.folder
    everything = all_documents(corpus, "train") + all_documents(corpus, "held_out")
    assert sorted(everything) == sorted(source_documents(two_domains))


def test_an_unknown_tokenizer_is_refused(two_domains):
    with pytest.raises(ConfigError, match=r"data\.tokenizer is 'word'; it must be 'bpe', 'byte', or the path of a"):
        prepare(two_domains, tokenizer="word")


def test_a_long_document_is_encoded_in_parts_and_stays_one(two_domains, monkeypatch):
    whole = prepare(two_domains, tokenizer="byte", held_out=0.2)
    monkeypatch.setattr(writing, "LONGEST", 100)
    monkeypatch.setattr(writing, "BATCH", 1000)
    parts = prepare(two_domains, tokenizer="byte", held_out=0.2, cache=two_domains.with_name("other"))
    assert contents(parts.folder) == contents(whole.folder)


def test_duplicates_are_left_out_the_first_stays(two_domains, text, small_units):
    verse = two_domains / "verse"
    for i in range(10):
        (verse / f"copy{i}.txt").write_bytes((verse / f"{i}.txt").read_bytes())
    (two_domains / "late.txt").write_bytes((verse / "3.txt").read_bytes() + text(100_000, seed=5).encode())
    kept = prepare(two_domains, tokenizer="byte", held_out=0.2)
    corpus = prepare(two_domains, tokenizer="byte", held_out=0.2, deduplicate=True)
    before, after = (all_documents(one, "train") + all_documents(one, "held_out") for one in (kept, corpus))
    assert len(after) == len(set(after)) == len(set(before)) == len(before) - 10
    assert set(documents_of(corpus.train["verse"], corpus.tokenizer)) < set(before)


def test_a_document_in_two_domains_stays_in_the_first(tmp_path, text):
    shared = [text(900, seed=i) for i in range(4)]
    for name, extra in (("a", 10), ("b", 20)):
        (tmp_path / "t" / name).mkdir(parents=True)
        for i, one in enumerate([*shared, *(text(900, seed=extra + i) for i in range(4))]):
            (tmp_path / "t" / name / f"{i}.txt").write_text(one, encoding="utf-8")
    corpus = prepare(tmp_path / "t", tokenizer="byte", held_out=0.3, deduplicate=True)
    counts = {name: corpus.train[name].num_documents + corpus.held_out[name].num_documents for name in "ab"}
    assert counts == {"a": 8, "b": 4}


def test_of_equal_documents_the_same_one_is_kept_however_domains_interleave(tmp_path, text, small_units):
    """Such corpora have one key, and the cache holds one of them."""
    rows = {site: [{"text": text(900, seed=i), "site": site} for i in numbers] for site, numbers in SITES.items()}
    one_by_one = [row for pair in zip(rows["a"], rows["b"], strict=True) for row in pair]
    made = []
    for name, order in (("apart", rows["a"] + rows["b"]), ("mixed", one_by_one)):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "all.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in order), encoding="utf-8")
        options = {"tokenizer": "byte", "held_out": 0.3, "domain_column": "site", "cache": tmp_path / name / "cache"}
        made.append(prepare(file, deduplicate=True, **options))
    apart, mixed = made
    assert mixed.hash == apart.hash
    for side in ("train", "held_out"):
        found = [
            {site: documents_of(stream, one.tokenizer) for site, stream in getattr(one, side).items()} for one in made
        ]
        assert found[0] == found[1]
    counts = {site: apart.train[site].num_documents + apart.held_out[site].num_documents for site in "ab"}
    assert counts == {"a": 9, "b": 5}


def test_no_document_is_on_both_sides_even_of_different_domains(tmp_path, text):
    shared = [text(900, seed=i) for i in range(12)]
    for name, documents in (("large", shared), ("small", shared[4:7]), ("tiny", shared[10:])):
        (tmp_path / "t" / name).mkdir(parents=True)
        for i, one in enumerate(documents):
            (tmp_path / "t" / name / f"{i}.txt").write_text(one, encoding="utf-8")
    corpus = prepare(tmp_path / "t", tokenizer="byte", held_out=0.01)
    train, held_out = (all_documents(corpus, side) for side in ("train", "held_out"))
    assert sorted(train + held_out) == sorted(shared + shared[4:7] + shared[10:])
    assert not set(train) & set(held_out)
    assert all(stream.num_documents for part in (corpus.train, corpus.held_out) for stream in part.values())


def test_domains_that_leave_each_other_nothing_are_refused(tmp_path, text):
    in_order = sorted((text(900, seed=i) for i in range(3)), key=digest)
    for name, documents in (("a", in_order[:2]), ("b", in_order[1:])):
        (tmp_path / "t" / name).mkdir(parents=True)
        for i, one in enumerate(documents):
            (tmp_path / "t" / name / f"{i}.txt").write_text(one, encoding="utf-8")
    with pytest.raises(DataError, match=r"domain a: shares so many of its few documents .* none is left to train on"):
        prepare(tmp_path / "t", tokenizer="byte", held_out=1e-9)


def test_nothing_but_blank_documents_is_refused(tmp_path):
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"blank\.jsonl: every document in it is blank"):
        prepare(tmp_path / "blank.jsonl")


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


def test_progress_is_reported_in_order(two_domains, spec, monkeypatch):
    monkeypatch.setattr(writing, "BATCH", 3000)
    monkeypatch.setattr(writing, "REPORTED", 3000)
    told = []
    prepare(two_domains, **spec, progress=lambda *line: told.append(line))
    stages = list(dict.fromkeys(stage for stage, _, _ in told))
    learning = ["sampling", "learning the tokenizer"] if spec["tokenizer"] == "bpe" else []
    assert stages == ["reading", *learning, "writing tokens"]
    shares = [(done, total) for stage, done, total in told if stage == "writing tokens"]
    assert shares == sorted(shares) and len(set(shares)) > 5
    assert shares[0][0] == 0
    assert shares[-1][0] == shares[-1][1] == sum(len(text.encode()) for text in source_documents(two_domains))


def test_text_too_short_to_split_names_the_domain(tmp_path):
    for name in ("poem", "story"):
        (tmp_path / f"{name}.txt").write_text("Rose is a rose.\n", encoding="utf-8")
    with pytest.raises(DataError, match=r", domain poem: too short to hold a part out, it has one document only; give"):
        prepare(tmp_path)


def test_a_table_without_rows_is_refused(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    parquet.ParquetWriter(tmp_path / "none.parquet", rows.schema).close()
    for deduplicate in (False, True):
        with pytest.raises(DataError, match=r"none\.parquet: every document in it is blank; give text"):
            prepare(tmp_path / "none.parquet", deduplicate=deduplicate)


def test_a_column_of_far_too_many_domains_is_refused(tmp_path):
    lines = [f'{{"text": "some text {i}", "site": "{i}"}}' for i in range(1100)]
    (tmp_path / "all.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=r"more than 1000 domains, such as '0', '1', '2'; is data\.domain_column"):
        prepare(tmp_path / "all.jsonl", domain_column="site")


def test_a_small_file_is_enough(tmp_path, text):
    (tmp_path / "note.txt").write_text(text(4000), encoding="utf-8")
    corpus = prepare(tmp_path / "note.txt", tokenizer="byte", held_out=0.1)
    assert corpus.held_out["note"].num_bytes > 0
    assert corpus.train["note"].num_bytes > 3000


def test_documents_never_change_sides_as_a_folder_grows(two_domains, text):
    choose = random.Random(4)
    held_out = set(all_documents(prepare(two_domains, tokenizer="byte", held_out=0.3), "held_out"))
    for i in range(3):
        (two_domains / "verse" / f"{choose.random()}.txt").write_text(text(500, seed=1000 + i), encoding="utf-8")
        grown = prepare(two_domains, tokenizer="byte", held_out=0.3)
        assert held_out <= set(all_documents(grown, "held_out"))
        assert not held_out & set(all_documents(grown, "train"))


SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(not SHARED.exists(), reason="the experiments' data folder ../shared/data is not here")
def test_one_long_file_gets_a_sensible_held_out_part():
    corpus = prepare(SHARED / "tinyshakespeare" / "input.txt", vocab_size=512)
    share = corpus.held_out["input"].num_bytes / 1_115_394
    assert 0.02 < share < 0.12
