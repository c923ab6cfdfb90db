import json
import os

import pytest
from corpus_case import all_documents, contents

from himoe.data import BPETokenizer, corpus, prepare, verify
from himoe.data.preparation import prepare as preparation
from himoe.errors import ConfigError, DataError


@pytest.fixture
def prepared(two_domains, tmp_path):
    """A folder of its own, whose text is gone."""
    made = prepare(two_domains, vocab_size=300, held_out=0.2, out=tmp_path / "prepared")
    two_domains.rename(tmp_path / "hidden")
    return made


def shard_of(folder, name="train-000-000000.tokens"):
    assert (folder / name).is_file()
    return folder / name


def test_a_folder_of_its_own_can_be_moved_and_opened(prepared, tmp_path):
    moved = prepare(prepared.folder.rename(tmp_path / "else" if (tmp_path / "else").mkdir() else tmp_path / "else/it"))
    assert (moved.name, moved.hash, moved.domains) == ("text", prepared.hash, ["letters", "verse"])
    assert moved.folder == tmp_path / "else/it"
    assert moved.train["verse"].num_documents > 0
    assert all_documents(moved, "train")


def test_it_holds_no_path_of_this_machine(prepared, tmp_path):
    assert all(str(tmp_path).encode() not in content for content in contents(prepared.folder).values())


def test_the_cache_and_a_folder_of_its_own_hold_the_same(two_domains, prepared, tmp_path):
    cached = prepare((tmp_path / "hidden").rename(two_domains), vocab_size=300, held_out=0.2)
    assert contents(cached.folder) == contents(prepared.folder)
    assert cached.hash == prepared.hash


def test_the_same_text_into_the_same_folder_is_opened(two_domains, tmp_path, monkeypatch):
    first = prepare(two_domains, tokenizer="byte", out=tmp_path / "prepared")
    monkeypatch.setattr(preparation, "build", None)
    assert prepare(two_domains, tokenizer="byte", out=tmp_path / "prepared").hash == first.hash


def test_a_folder_with_anything_else_in_it_is_left_alone(two_domains, tmp_path):
    prepare(two_domains, tokenizer="byte", out=tmp_path / "prepared")
    before = contents(tmp_path / "prepared")
    with pytest.raises(DataError, match=r"prepared: holds a corpus of other text or settings; delete .*/prepared, or"):
        prepare(two_domains, tokenizer="byte", held_out=0.3, out=tmp_path / "prepared")
    assert contents(tmp_path / "prepared") == before
    before = contents(two_domains)
    with pytest.raises(DataError, match="text: not empty and no prepared corpus; nothing was changed"):
        prepare(two_domains, tokenizer="byte", out=two_domains)
    assert contents(two_domains) == before


def test_a_prepared_text_is_not_written_to_another_folder(prepared, tmp_path):
    with pytest.raises(ConfigError, match="prepared: prepared already, and opened as it is; leave `out` away, or copy"):
        prepare(prepared.folder, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("damage", ["shard", "corpus.json", "tokenizer.json", "format"])
def test_what_to_do_with_a_damaged_folder_of_ones_own(two_domains, tmp_path, damage):
    """Preparing it again, as is advised elsewhere, would come to the same damage."""
    out = prepare(two_domains, tokenizer="byte", out=tmp_path / "out").folder
    if damage == "format":
        description = json.loads((out / "corpus.json").read_text(encoding="utf-8"))
        (out / "corpus.json").write_text(json.dumps(description | {"himoe_corpus": 2}), encoding="utf-8")
    else:
        file = shard_of(out) if damage == "shard" else out / damage
        file.write_bytes(file.read_bytes()[:-3] + b"xyz")
    before = contents(out)
    with pytest.raises(DataError, match=rf"^{out}: .*; delete {out}, or choose another folder$"):
        prepare(two_domains, tokenizer="byte", out=out)
    assert contents(out) == before


def test_an_unfinished_folder_is_no_text(two_domains, tmp_path):
    def interrupt(stage, done, total):
        if stage == "writing tokens":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(two_domains, tokenizer="byte", out=tmp_path / "prepared", progress=interrupt)
    with pytest.raises(DataError, match="prepared: its preparation was not finished; start `himoe prepare"):
        prepare(tmp_path / "prepared")
    assert prepare(two_domains, tokenizer="byte", out=tmp_path / "prepared").train["verse"].num_tokens > 0


def test_another_tokenizer_than_its_own_is_refused(prepared, tmp_path):
    assert prepare(prepared.folder, vocab_size=5000).hash == prepared.hash
    with pytest.raises(ConfigError, match=r"data\.tokenizer is 'byte', but .* was prepared with another one \(bpe\)"):
        prepare(prepared.folder, tokenizer="byte")
    BPETokenizer.train(["other text"], 270).save(tmp_path / "other.json")
    with pytest.raises(ConfigError, match="was prepared with another one"):
        prepare(prepared.folder, tokenizer=tmp_path / "other.json")
    assert prepare(prepared.folder, tokenizer=prepared.folder / "tokenizer.json").hash == prepared.hash


@pytest.mark.parametrize("damage", ["missing", "truncated", "changed"])
def test_a_damaged_shard_is_named_and_refused(prepared, damage):
    shard = shard_of(prepared.folder)
    content = shard.read_bytes()
    shard.unlink()
    if damage != "missing":
        shard.write_bytes(content[:-2] if damage == "truncated" else content[:-2] + b"??")
    reason = {"missing": "No such file", "truncated": r"\d+ bytes, expected \d+", "changed": "content differs"}[damage]
    for check in (prepare, verify):
        with pytest.raises(DataError, match=rf"prepared: damaged: {shard.name} \({reason}.*\); prepare the data again"):
            check(prepared.folder)


def test_a_damaged_description_or_tokenizer_is_refused(prepared):
    for name in ("corpus.json", "tokenizer.json"):
        file = prepared.folder / name
        content = file.read_text(encoding="utf-8")
        for damaged in (content[:-20], content.replace("1", "2", 1) if name == "tokenizer.json" else content + "{"):
            file.write_text(damaged, encoding="utf-8")
            with pytest.raises(DataError, match=name.replace(".", r"\.")):
                prepare(prepared.folder)
        file.write_text(content, encoding="utf-8")
    description = json.loads(content := (prepared.folder / "corpus.json").read_text(encoding="utf-8"))
    for change, complaint in (
        ({"name": "other"}, "differs from its recorded hash"),
        ({"himoe_corpus": 99}, "prepared in format 99, this version reads"),
    ):
        (prepared.folder / "corpus.json").write_text(json.dumps(description | change), encoding="utf-8")
        with pytest.raises(DataError, match=complaint):
            prepare(prepared.folder)


def test_of_a_large_folder_hashes_are_checked_once_per_state(prepared, monkeypatch, tmp_path):
    monkeypatch.setattr(corpus, "QUICK", 0)
    hashed = []
    differing = corpus._differing
    monkeypatch.setattr(corpus, "_differing", lambda *given: hashed.append(1) or differing(*given))
    prepare(prepared.folder)
    assert len(hashed) == 1
    prepare(prepared.folder)
    assert len(hashed) == 1
    verify(prepared.folder)
    assert len(hashed) == 2
    shard = shard_of(prepared.folder)
    shard.write_bytes(shard.read_bytes()[:-2] + b"??")
    with pytest.raises(DataError, match="content differs"):
        prepare(prepared.folder)
    moved = prepared.folder.rename(tmp_path / "moved")
    with pytest.raises(DataError, match="content differs"):
        prepare(moved)


def test_damage_under_a_time_that_was_set_back_is_found_and_never_forgotten(prepared, monkeypatch):
    monkeypatch.setattr(corpus, "QUICK", 0)
    prepare(prepared.folder)
    shard = shard_of(prepared.folder)
    time = shard.stat().st_mtime_ns
    shard.write_bytes(shard.read_bytes()[:-2] + b"??")
    os.utime(shard, ns=(time, time))
    with pytest.raises(DataError, match="content differs"):
        prepare(prepared.folder)


def test_damage_that_only_a_full_check_can_see_is_remembered(prepared, monkeypatch):
    """As when the disk loses a byte, which changes no time."""
    monkeypatch.setattr(corpus, "QUICK", 0)
    differing = corpus._differing
    with monkeypatch.context() as patched:
        patched.setattr(corpus, "_differing", lambda *_: [])
        shard = shard_of(prepared.folder)
        shard.write_bytes(shard.read_bytes()[:-2] + b"??")
        prepare(prepared.folder)
    assert prepare(prepared.folder).hash and corpus._differing is differing
    with pytest.raises(DataError, match="content differs"):
        verify(prepared.folder)
    with pytest.raises(DataError, match="content differs"):
        prepare(prepared.folder)


def test_what_was_just_written_is_not_read_again(two_domains, monkeypatch, tmp_path):
    monkeypatch.setattr(corpus, "QUICK", 0)
    monkeypatch.setattr(corpus, "_differing", None)
    made = prepare(two_domains, tokenizer="byte", out=tmp_path / "prepared")
    assert prepare(made.folder).hash == made.hash


def test_every_byte_is_checked_on_demand(prepared):
    number, size = verify(prepared.folder)
    shards = list(prepared.folder.glob("*.tokens"))
    assert (number, size) == (len(shards), sum(shard.stat().st_size for shard in shards))


def test_a_text_file_called_corpus_json_is_text(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "corpus.json").write_text("[1, 2,\n\n3]\n" * 300, encoding="utf-8")
    assert prepare(tmp_path / "t", tokenizer="byte").domains == ["corpus"]
