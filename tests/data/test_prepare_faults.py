"""Preparations that are interrupted, disturbed, or find their folder in a state that it should not be in."""

import contextlib
import os
import resource
import shutil
import signal
import time
from functools import partial

import pytest
from corpus_case import all_documents, contents, source_documents

from himoe.data import BPETokenizer, prepare
from himoe.data.preparation import choice, writing
from himoe.data.preparation import prepare as preparation
from himoe.data.preparation.scan import scan_unit
from himoe.data.text import read_source
from himoe.errors import DataError, HimoeWarning


def test_a_change_that_leaves_size_and_time_as_they_were_a_moment_ago_is_noticed(two_domains):
    file = two_domains / "verse" / "3.txt"
    file.write_text("a" * 1000, encoding="utf-8")
    now = time.time_ns()
    os.utime(file, ns=(now, now))
    first = prepare(two_domains, tokenizer="byte", held_out=0.2)
    file.write_text("b" * 1000, encoding="utf-8")
    os.utime(file, ns=(now, now))
    assert prepare(two_domains, tokenizer="byte", held_out=0.2).hash != first.hash


def test_a_cache_that_cannot_be_written_is_named_with_the_variable(two_domains, tmp_path):
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    with pytest.raises(DataError, match=r"file: cannot keep the prepared data there: Not a dir.*HIMOE_CACHE"):
        prepare(two_domains, cache=tmp_path / "file")


@pytest.mark.parametrize(("limit", "workers"), [(100, 1), (2_000, 1), (2_000, 2)])
def test_after_a_full_disk_the_same_call_goes_on(two_domains, spec, cache, limit, workers, small_units, tmp_path):
    """A limit on the size of files stands for the full disk: writes fail in the middle, the same way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(DataError, match="cannot keep the prepared data there: File too large; free some space"):
            prepare(two_domains, **spec, workers=workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert workers > 1 or not list(cache.rglob("*.tmp"))  # other workers are stopped wherever they are
    after = prepare(two_domains, **spec)
    assert contents(after.folder) == contents(prepare(two_domains, **spec, cache=tmp_path / "undisturbed").folder)


def test_work_that_was_interrupted_is_not_done_again(two_domains, small_units, tmp_path, monkeypatch):
    def interrupt(stage, done, total):
        if stage == "writing tokens" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(two_domains, vocab_size=300, workers=1, progress=interrupt)
    written = []
    write = writing.write_unit
    monkeypatch.setattr(
        writing, "write_unit", lambda plan, index, *rest: written.append(index) or write(plan, index, *rest)
    )
    monkeypatch.setattr(BPETokenizer, "train", None)
    again = prepare(two_domains, vocab_size=300, workers=1)
    units = len(preparation.read_source(two_domains).units)
    assert 0 < len(written) < units and written == list(range(units - len(written), units))
    monkeypatch.undo()
    monkeypatch.setattr(
        preparation, "read_source", lambda path, **options: read_source(path, unit_size=4000, **options)
    )
    whole = prepare(two_domains, vocab_size=300, workers=1, cache=tmp_path / "undisturbed")
    assert contents(again.folder) == contents(whole.folder)


@pytest.mark.parametrize("damaged", [lambda content: content[:-2], lambda content: b"\0" * len(content)])
def test_what_a_killed_process_left_is_done_again_or_cleared_away(two_domains, small_units, tmp_path, damaged):
    def interrupt(stage, done, total):
        if stage == "writing tokens" and done > total / 2:
            raise KeyboardInterrupt

    made = {"tokenizer": "byte", "workers": 1, "out": tmp_path / "out"}
    with pytest.raises(KeyboardInterrupt):
        prepare(two_domains, **made, progress=interrupt)
    cut = next((tmp_path / "out").glob("*.tokens"))
    cut.write_bytes(damaged(cut.read_bytes()))  # as a power cut may leave it
    for process in (12345, os.getpid()):  # in a container numbers come again
        for place in (0, 3, 6):
            (tmp_path / "out" / f"train-000-{place:06}.tokens.{process}.tmp").write_bytes(b"half of it")
    (tmp_path / "out" / "units" / "000000.json").write_text("{", encoding="utf-8")
    prepare(two_domains, **made)
    whole = prepare(two_domains, **made | {"out": tmp_path / "undisturbed"})
    assert contents(tmp_path / "out") == contents(whole.folder)


def test_text_that_changes_under_way_is_noticed_and_read_anew(two_domains, monkeypatch):
    def change_after(folder, index, unit, advance):
        found = scan_unit(folder, index, unit, advance)
        (two_domains / "verse" / "3.txt").write_text("all new" * 300, encoding="utf-8")
        return found

    monkeypatch.setattr("himoe.data.preparation.scan.scan_unit", change_after)
    with pytest.raises(DataError, match="changed while the text was being prepared; run the same command again"):
        prepare(two_domains, tokenizer="byte", held_out=0.2)
    monkeypatch.undo()
    corpus = prepare(two_domains, tokenizer="byte", held_out=0.2)
    assert "all new" * 300 in all_documents(corpus, "train") + all_documents(corpus, "held_out")


def test_text_that_changes_while_it_is_sampled_and_back_leaves_no_trace(two_domains, tmp_path, monkeypatch):
    file, read = two_domains / "letters.md", choice.read_texts
    before = file.read_bytes()

    def changed(*arguments):
        file.write_bytes(before.replace(b"fox", b"cat"))
        return read(*arguments)

    monkeypatch.setattr(choice, "read_texts", changed)
    with pytest.raises(DataError, match="changed while the text was being prepared"):
        prepare(two_domains, vocab_size=300, out=tmp_path / "out")
    monkeypatch.undo()
    file.write_bytes(before)
    corpus = prepare(two_domains, vocab_size=300, out=tmp_path / "out")
    undisturbed = prepare(two_domains, vocab_size=300, out=tmp_path / "undisturbed")
    assert contents(corpus.folder) == contents(undisturbed.folder)


def test_a_change_whose_time_was_set_back_is_noticed(two_domains, cache):
    file = two_domains / "letters.md"
    first = prepare(two_domains, tokenizer="byte", held_out=0.2)
    file.write_bytes(file.read_bytes().replace(b"fox", b"cat"))
    os.utime(file, (10**9, 10**9))
    assert prepare(two_domains, tokenizer="byte", held_out=0.2).hash != first.hash


@pytest.mark.parametrize("left", [b"", b"PK\x03\x04 half of it"])
def test_a_scan_that_a_power_cut_left_empty_is_made_again(two_domains, cache, left):
    first = prepare(two_domains, tokenizer="byte", held_out=0.2)
    (unit,) = (cache / "scans").rglob("*.npz")
    unit.write_bytes(left)
    (unit.parent / "scan.json").unlink()
    assert prepare(two_domains, tokenizer="byte", held_out=0.2).hash == first.hash
    unit.write_bytes(left)
    assert prepare(two_domains, tokenizer="byte", held_out=0.3).hash != first.hash


def test_a_folder_made_again_uses_its_own_tokenizer(two_domains, tmp_path):
    for size in (300, 400):
        corpus = prepare(two_domains, vocab_size=size, held_out=0.2, out=tmp_path / "out")
        found = all_documents(corpus, "train") + all_documents(corpus, "held_out")
        assert sorted(found) == sorted(source_documents(two_domains))
        shutil.rmtree(tmp_path / "out")


def test_a_folder_filled_by_another_process_with_other_settings_is_refused(two_domains, tmp_path, monkeypatch):
    out, lock = tmp_path / "out", preparation._lock
    other = prepare(two_domains, tokenizer="byte", held_out=0.3)

    @contextlib.contextmanager
    def late(folder, report):
        with lock(folder, report):
            if folder == out:
                shutil.copytree(other.folder, out, dirs_exist_ok=True)
            yield

    monkeypatch.setattr(preparation, "_lock", late)
    with pytest.raises(DataError, match="out: holds a corpus of other text or settings"):
        prepare(two_domains, tokenizer="byte", held_out=0.2, out=out)
    assert contents(out) == contents(other.folder)


def begin(path, **options):
    """Prepare a text, and stop in the middle of it."""

    def interrupt(stage, done, total):
        if stage == "writing tokens" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(path, workers=1, progress=interrupt, **options)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("other", ["text", "settings"])
def test_an_unfinished_folder_of_other_text_or_settings_is_left_alone(
    two_domains, tmp_path, small_units, monkeypatch, other, late
):
    """Whether it is there at the beginning, or is left by a process that was waited for."""
    out, lock = tmp_path / "out", preparation._lock
    begin(two_domains, tokenizer="byte", held_out=0.2, out=out)
    before = contents(out)
    if late:
        out.rename(tmp_path / "away")

        @contextlib.contextmanager
        def after_the_other(folder, report):
            with lock(folder, report):
                if folder == out:
                    shutil.copytree(tmp_path / "away", out, dirs_exist_ok=True)
                yield

        monkeypatch.setattr(preparation, "_lock", after_the_other)
    if other == "text":
        (two_domains / "letters.md").write_bytes((two_domains / "letters.md").read_bytes() + b"one more line\n")
    for _ in range(2):
        with pytest.raises(DataError, match=r"holds an unfinished corpus of other text or settings; delete .*/out, or"):
            prepare(two_domains, tokenizer="byte", held_out=0.3 if other == "settings" else 0.2, out=out)
        assert contents(out) == before


def test_an_unfinished_folder_of_the_same_text_in_other_units_is_begun_anew(
    two_domains, tmp_path, small_units, monkeypatch
):
    (two_domains / "letters.md").unlink()  # units do not cut the other files
    made = {"tokenizer": "byte", "held_out": 0.2}
    for place in ({"out": tmp_path / "out"}, {}):
        begin(two_domains, **made, **place)
    monkeypatch.setattr(preparation, "read_source", partial(read_source, unit_size=9000))
    whole = contents(prepare(two_domains, **made, out=tmp_path / "whole").folder)
    for place in ({"out": tmp_path / "out"}, {}):
        assert contents(prepare(two_domains, **made, **place).folder) == whole


def test_after_text_has_changed_under_way_the_same_command_goes_on(two_domains, tmp_path, monkeypatch):
    file, out = two_domains / "letters.md", tmp_path / "out"
    write = writing.write_unit

    def changed(*arguments):
        file.write_bytes(file.read_bytes().replace(b"fox", b"cat"))
        return write(*arguments)

    monkeypatch.setattr(writing, "write_unit", changed)
    with pytest.raises(DataError, match="changed while the text was being prepared; run the same command again"):
        prepare(two_domains, tokenizer="byte", out=out, workers=1)
    monkeypatch.undo()
    assert prepare(two_domains, tokenizer="byte", out=out).folder == out


def test_a_folder_in_which_a_killed_process_had_hardly_begun_is_used(two_domains, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "preparation.json.123.tmp").write_text("{", encoding="utf-8")
    assert sorted(contents(prepare(two_domains, tokenizer="byte", out=tmp_path / "out").folder))[0] == "corpus.json"


def test_a_folder_with_a_file_that_is_only_named_like_ours_is_left_alone(two_domains, tmp_path):
    (tmp_path / "out" / "units").mkdir(parents=True)
    for name in ("preparation.json", "tokenizer.json", "units/mine"):
        (tmp_path / "out" / name).write_text('{"mine": true}', encoding="utf-8")
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match="not empty and no prepared corpus; nothing was changed"):
        prepare(two_domains, tokenizer="byte", out=tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_lock_on_a_folder_that_was_deleted_meanwhile_is_taken_anew(tmp_path):
    folder = tmp_path / "cache" / "text"
    folder.mkdir(parents=True)

    def deleted(descriptor, _operation):
        if folder.exists() and not made:
            shutil.rmtree(tmp_path / "cache")
        made.append(descriptor)

    made: list[int] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(preparation.fcntl, "flock", deleted)
        with preparation._lock(folder, lambda *_: None):
            assert folder.is_dir() and len(made) == 2


def test_unfinished_work_is_deleted_when_nobody_goes_on_with_it(two_domains, cache, monkeypatch):
    def interrupt(stage, done, total):
        if stage == "writing tokens":
            raise KeyboardInterrupt

    for held_out in (0.2, 0.3):
        with pytest.raises(KeyboardInterrupt):
            prepare(two_domains, tokenizer="byte", held_out=held_out, progress=interrupt)
    assert len(list((cache / "corpora").iterdir())) == 2
    monkeypatch.setattr(preparation, "FORGOTTEN", -10)
    corpus = prepare(two_domains, tokenizer="byte", held_out=0.3)
    assert list((cache / "corpora").iterdir()) == [corpus.folder]


def test_a_damaged_cache_is_prepared_again_with_a_word(two_domains, spec):
    intact = prepare(two_domains, **spec)
    before = contents(intact.folder)
    for name in before:
        for damaged in (None, before[name][:-3], before[name][:-3] + b"xyz"):
            (intact.folder / name).unlink()
            if damaged is not None:
                (intact.folder / name).write_bytes(damaged)
            if name == "corpus.json" and damaged is None:
                assert prepare(two_domains, **spec).hash == intact.hash
            else:
                with pytest.warns(HimoeWarning, match=rf"{name}.*; prepare the data again: that is done now"):
                    assert prepare(two_domains, **spec).hash == intact.hash
            assert contents(intact.folder) == before
