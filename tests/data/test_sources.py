import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from himoe.data.sources import cut, read_source
from himoe.errors import DataError


def test_a_file_is_one_domain_named_by_its_stem(tmp_path, text):
    file = tmp_path / "sonnets.txt"
    file.write_text(text(5000), encoding="utf-8")
    documents = read_source(file).load()
    assert list(documents) == ["sonnets"]
    assert "".join(documents["sonnets"]) == text(5000)
    assert len(documents["sonnets"]) > 5, "a lone small file is cut fine enough to hold some of it out"


def test_first_level_entries_of_a_folder_are_domains_and_hidden_ones_are_not(two_domains):
    (two_domains / ".hidden").write_bytes(b"\xff")
    (two_domains / "verse" / ".hidden").write_bytes(b"\xff")
    (two_domains / "verse" / "deeper").mkdir()
    (two_domains / "verse" / "deeper" / "last.txt").write_text("deep down", encoding="utf-8")
    (two_domains / "empty folder").mkdir()
    documents = read_source(two_domains).load()
    assert list(documents) == ["letters", "verse"]
    assert len(documents["verse"]) == 11
    assert "deep down" in documents["verse"]


def test_line_ends_and_byte_order_marks_stay_as_they_are(tmp_path):
    content = "\ufeffone\r\ntwo\rthree\n" * 100
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert "".join(read_source(tmp_path / "a.txt").load()["a"]) == content


def test_the_fingerprint_follows_the_content_not_the_place(two_domains, tmp_path):
    before = read_source(two_domains).fingerprint
    moved = tmp_path / "elsewhere"
    two_domains.rename(moved)
    assert read_source(moved).fingerprint == before
    (moved / "letters.md").rename(moved / "notes.md")
    assert read_source(moved).fingerprint != before


@given(st.text(max_size=400), st.integers(4, 40))
def test_cut_pieces_join_to_the_text_and_keep_their_size(text, piece):
    pieces = cut(text, piece)
    assert "".join(pieces) == text
    sizes = [len(part.encode()) for part in pieces]
    if len(pieces) > 1:
        assert all(piece <= size <= 4 * piece + 3 for size in sizes[:-1])
        assert 0 < sizes[-1] <= 4 * piece + 3
    else:
        assert sizes[0] <= 4 * piece + 3


def test_cut_prefers_a_blank_line_then_a_line_end():
    assert cut("aaaa\nbbbb\n\ncccc\ndddd\n", 4) == ["aaaa\nbbbb\n\n", "cccc\n", "dddd\n"]


def test_a_megabyte_is_cut_into_documents_of_sixteen_kib_or_a_little_more(tmp_path, text):
    (tmp_path / "big.txt").write_text(text(1_000_000), encoding="utf-8")
    sizes = [len(part.encode()) for part in read_source(tmp_path / "big.txt").load()["big"]]
    assert 50 < len(sizes) < 70
    assert min(sizes[:-1]) >= 16 * 1024


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"abc\0def", "binary"),
        (b"\x89PNG\0\xff", "binary"),
        (b"caf\xe9 au lait", "not UTF-8 at byte 3"),
    ],
)
def test_a_bad_file_is_named_with_its_reason(tmp_path, content, reason):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"1 of 1 files cannot be used: bad\.txt \({reason}\); data must be UTF-8"):
        read_source(tmp_path / "bad.txt")


def test_bad_files_of_a_folder_are_counted_and_the_first_five_named(two_domains):
    for i in range(7):
        (two_domains / "verse" / f"bad{i}.txt").write_bytes(b"\0")
    with pytest.raises(DataError, match="7 of 18 files cannot be used") as caught:
        read_source(two_domains)
    message = str(caught.value)
    assert re.findall(r"bad\d", message) == [f"bad{i}" for i in range(5)]
    assert "and 2 more" in message
    assert "\n" not in message


def test_missing_empty_and_ambiguous_paths_are_refused(tmp_path, text):
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        read_source(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no files"):
        read_source(tmp_path)
    (tmp_path / "a.txt").write_text(text(100), encoding="utf-8")
    (tmp_path / "a.md").write_text(text(100), encoding="utf-8")
    with pytest.raises(DataError, match="two entries give the domain 'a'"):
        read_source(tmp_path)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        read_source(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_and_folders_are_refused(two_domains):
    (two_domains / "letters.md").chmod(0)
    with pytest.raises(DataError, match=r"letters\.md \(unreadable: Permission denied\)"):
        read_source(two_domains)
    (two_domains / "verse").chmod(0)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        read_source(two_domains)
