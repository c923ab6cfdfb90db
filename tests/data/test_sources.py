import json
import os
import pickle
import random
import re
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from himoe.data.text import Source, read_source, read_sources
from himoe.data.text.cutting import cut
from himoe.errors import DataError


def documents(source: Source) -> dict[str, list[str]]:
    """All documents by domain; every unit is read as another process would read it."""
    found: dict[str, list[str]] = {}
    for unit in source.units:
        for domain, text in pickle.loads(pickle.dumps(unit)).documents():
            found.setdefault(domain, []).append(text)
    return found


def test_a_file_is_one_domain_named_by_its_stem(tmp_path, text):
    file = tmp_path / "sonnets.txt"
    file.write_text(text(5000), encoding="utf-8")
    found = documents(read_source(file))
    assert list(found) == ["sonnets"]
    assert "".join(found["sonnets"]) == text(5000)
    assert len(found["sonnets"]) > 5, "a lone small file is cut fine enough to hold some of it out"


def test_first_level_entries_of_a_folder_are_domains_and_hidden_ones_are_not(two_domains):
    (two_domains / ".hidden").write_bytes(b"\xff")
    (two_domains / "verse" / ".hidden").write_bytes(b"\xff")
    (two_domains / "verse" / "deeper").mkdir()
    (two_domains / "verse" / "deeper" / "last.txt").write_text("deep down", encoding="utf-8")
    (two_domains / "empty folder").mkdir()
    found = documents(read_source(two_domains))
    assert list(found) == ["letters", "verse"]
    assert len(found["verse"]) == 11
    assert "deep down" in found["verse"]


def test_line_ends_and_byte_order_marks_stay_as_they_are(tmp_path):
    content = "\ufeffone\r\ntwo\rthree\n" * 100
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert "".join(documents(read_source(tmp_path / "a.txt"))["a"]) == content


def test_a_link_is_followed_to_a_file_and_from_the_top_to_a_folder_but_not_in_circles(two_domains, tmp_path):
    shutil.move(two_domains / "letters.md", tmp_path / "kept.md")
    (two_domains / "letters.md").symlink_to(tmp_path / "kept.md")
    shutil.move(two_domains / "verse", tmp_path / "verse kept")
    (two_domains / "verse").symlink_to(tmp_path / "verse kept")
    (tmp_path / "verse kept" / "circle").symlink_to(two_domains)
    found = documents(read_source(two_domains))
    assert sorted(found) == ["letters", "verse"]
    assert len(found["verse"]) == 10


def test_the_signature_follows_names_sizes_times_and_options(two_domains, tmp_path):
    before = read_source(two_domains).signature
    assert before is not None
    assert read_source(two_domains).signature == before
    others = [
        read_source(two_domains, text_column="content").signature,
        read_source(two_domains, unit_size=1000).signature,
        read_sources({"all": two_domains}).signature,
    ]
    file = two_domains / "verse" / "0.txt"
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))
    others.append(read_source(two_domains).signature)
    with file.open("a") as more:
        more.write("more")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    others.append(read_source(two_domains).signature)
    (two_domains / "letters.md").rename(two_domains / "notes.md")
    others.append(read_source(two_domains).signature)
    assert len({before, *others}) == 7


def test_several_paths_are_a_domain_each(two_domains, tmp_path, text):
    (tmp_path / "other.txt").write_text(text(3000, seed=7), encoding="utf-8")
    source = read_sources({"books": two_domains, "rest": tmp_path / "other.txt"})
    found = documents(source)
    assert source.name == "books+rest"
    assert list(found) == ["books", "rest"]
    assert "".join(found["rest"]) == text(3000, seed=7)
    assert sum(map(len, found["books"])) == sum(len(file.read_text("utf-8")) for file in two_domains.rglob("*.*"))


lines = st.lists(st.text(st.sampled_from("ab \n\né猫👩"), max_size=30), max_size=40).map("\n".join)


@given(lines, st.integers(1, 200), st.randoms(use_true_random=False))
def test_a_text_file_in_units_of_any_size_read_in_any_order_is_the_file(tmp_path_factory, content, unit_size, order):
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_bytes((content + "end").encode())
    units = read_source(file, unit_size=unit_size).units
    numbered = list(enumerate(units))
    order.shuffle(numbered)
    parts = {i: [text for _, text in unit.documents()] for i, unit in numbered}
    assert "".join(text for i in range(len(units)) for text in parts[i]) == content + "end"
    assert parts == {i: [text for _, text in unit.documents()] for i, unit in enumerate(units)}
    assert len(units) == max(1, -(-file.stat().st_size // unit_size))


@given(
    st.lists(st.text(max_size=30), max_size=20),
    st.integers(1, 300),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
    st.booleans(),
)
def test_json_lines_in_units_of_any_size_are_the_lines(tmp_path_factory, texts, unit_size, ending, ascii_only):
    file = tmp_path_factory.mktemp("rows") / "a.jsonl"
    rows = [json.dumps({"text": text, "n": 1}, ensure_ascii=ascii_only) for text in [*texts, "last"]]
    file.write_bytes(ending.join(rows).encode())
    assert documents(read_source(file, unit_size=unit_size)) == {
        "a": [text for text in texts if text.strip()] + ["last"]
    }


def test_a_big_file_is_cut_where_a_document_begins(tmp_path, text):
    paragraphs = [text(random.Random(i).randint(50, 5000), seed=i) + "\n" for i in range(400)]
    (tmp_path / "a.txt").write_text("".join(paragraphs), encoding="utf-8")
    units = read_source(tmp_path / "a.txt", unit_size=100_000).units
    assert len(units) == -(-(tmp_path / "a.txt").stat().st_size // 100_000) > 5
    found = [[part for _, part in unit.documents()] for unit in units]
    assert all(part.endswith("\n\n") for parts in found for part in parts)
    assert sum(map(len, found)) < 90


def test_small_files_share_units_whose_labels_name_them(two_domains):
    units = read_source(two_domains, unit_size=8000).units
    assert [unit.label for unit in units][-3:] == [
        "verse/3.txt … verse/5.txt (3 files)",
        "verse/6.txt … verse/8.txt (3 files)",
        "verse/9.txt",
    ]
    assert re.fullmatch(r"letters\.md\[0:8000\]", units[0].label)
    assert all(unit.size <= 8000 and len(pickle.dumps(unit)) < 1500 for unit in units)
    assert sum(unit.size for unit in units) == sum(file.stat().st_size for file in two_domains.rglob("*.*"))


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
    sizes = [len(part.encode()) for part in documents(read_source(tmp_path / "big.txt"))["big"]]
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
        read_source(tmp_path / "bad.txt").units  # noqa: B018


def test_bad_files_of_a_folder_are_counted_and_the_first_five_named(two_domains):
    for i in range(7):
        (two_domains / "verse" / f"bad{i}.txt").write_bytes(b"\0")
    with pytest.raises(DataError, match="7 of 18 files cannot be used") as caught:
        documents(read_source(two_domains))
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


@pytest.mark.parametrize(("content", "reason"), [(b"\0", "binary: there is a zero"), (b"\xff", "not UTF-8")])
def test_what_the_first_bytes_do_not_show_is_named_with_its_place(tmp_path, text, content, reason):
    start = text(150_000).encode()
    (tmp_path / "a.txt").write_bytes(start + content + start)
    for unit_size in (2**25, 40_000):
        with pytest.raises(DataError, match=rf"a\.txt: {reason} at byte {len(start)}; data must be UTF-8 text"):
            documents(read_source(tmp_path / "a.txt", unit_size=unit_size))


def test_a_long_text_without_line_ends_is_cut_between_characters(tmp_path):
    (tmp_path / "a.txt").write_text("猫" * 200_000, encoding="utf-8")
    found = documents(read_source(tmp_path / "a.txt", unit_size=100_001))["a"]
    assert "".join(found) == "猫" * 200_000
    assert max(len(part.encode()) for part in found) <= 4 * 16 * 1024 + 3


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path, text):
    file = tmp_path / "a.txt"
    file.write_text(text(50_000), encoding="utf-8")
    units = read_source(file, unit_size=10_000).units
    os.truncate(file, 12_000)
    with pytest.raises(DataError, match=r"a\.txt: ends at byte 12000, earlier than before: it changed"):
        list(units[1].documents())


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        read_source(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_and_folders_are_refused(two_domains):
    (two_domains / "letters.md").chmod(0)
    with pytest.raises(DataError, match=r"letters\.md \(unreadable: Permission denied\)"):
        documents(read_source(two_domains))
    (two_domains / "verse").chmod(0)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        read_source(two_domains)
