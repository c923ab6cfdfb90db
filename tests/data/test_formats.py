import gzip
import json
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from himoe.data.text import Source, read_source
from himoe.data.text.columns import Columns
from himoe.data.text.formats import chunks, read_json_lines
from himoe.errors import DataError, MissingExtraError

zstandard = pytest.importorskip("zstandard")


def documents(source: Source) -> list[tuple[str, str]]:
    return [document for unit in source.units for document in unit.documents()]


def packed(kind: str, content: bytes) -> bytes:
    return gzip.compress(content) if kind == "gz" else zstandard.compress(content)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_text_gives_the_documents_of_the_plain_file(tmp_path, text, kind):
    for size in (3_000, 700_000):
        (tmp_path / "a.txt").write_text(text(size), encoding="utf-8")
        (tmp_path / f"packed.txt.{kind}").write_bytes(packed(kind, text(size).encode()))
        plain, unpacked = (
            documents(read_source(tmp_path / "a.txt")),
            documents(read_source(tmp_path / f"packed.txt.{kind}")),
        )
        assert [text for _, text in unpacked] == [text for _, text in plain]
        assert {domain for domain, _ in unpacked} == {"packed"}


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_data_may_be_several_streams_one_after_the_other(tmp_path, kind):
    (tmp_path / f"a.ndjson.{kind}").write_bytes(packed(kind, b'{"text": "one"}\n{"te') + packed(kind, b'xt": "two"}\n'))
    assert documents(read_source(tmp_path / f"a.ndjson.{kind}")) == [("a", "one"), ("a", "two")]


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_damaged_compressed_data_is_named_at_once_or_when_it_is_met(tmp_path, text, kind):
    whole = packed(kind, bytes((i * i * i // 7) % 90 + 32 for i in range(300_000)))
    file = tmp_path / f"a.txt.{kind}"
    file.write_bytes(whole[: len(whole) - 20])
    with pytest.raises(DataError, match=rf"a\.txt\.{kind}: damaged (gzip|zstd) data: .*end"):
        documents(read_source(file))
    file.write_bytes(b"not compressed at all, just a text with another name\n" * 9)
    with pytest.raises(DataError, match=rf"1 of 1 files cannot be used: a\.txt\.{kind} \(damaged (gzip|zstd) data"):
        documents(read_source(file))
    file.write_bytes(packed(kind, b""))
    with pytest.raises(DataError, match=rf"a\.txt\.{kind} \(empty\)"):
        documents(read_source(file))


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_small_file_that_unpacks_to_a_long_text_takes_little_memory(tmp_path, kind):
    (tmp_path / f"a.txt.{kind}").write_bytes(packed(kind, b"the same again\n" * 8_000_000))
    unit = read_source(tmp_path / f"a.txt.{kind}").units[0]
    tracemalloc.start()
    assert sum(len(text) for _, text in unit.documents()) == 120_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000_000


def test_zstandard_is_asked_for_by_name_where_it_is_missing(tmp_path, monkeypatch):
    (tmp_path / "a.txt.zst").write_bytes(packed("zst", b"text"))
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(MissingExtraError, match=r"zstandard is not installed; .*himoe\[data\]"):
        documents(read_source(tmp_path / "a.txt.zst"))


def rows(tmp_path, *lines: str | bytes, name: str = "a.jsonl"):
    file = tmp_path / name
    file.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return file


def test_a_line_is_a_document_and_blank_ones_are_none(tmp_path):
    file = rows(
        tmp_path, '{"text": "one\\n"}', "", '{"text": " \\n"}', '{"n": 1, "text": "zwei \\u00e9 \\ud83d\\ude00"}', ""
    )
    assert documents(read_source(file)) == [("a", "one\n"), ("a", "zwei é 😀")]
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert documents(read_source(file))[0] == ("a", "one\n")


def test_columns_name_the_text_and_the_domain(tmp_path):
    file = rows(tmp_path, '{"content": "one", "language": "en"}', '{"content": "zwei", "language": 49}')
    source = read_source(file, text_column="content", domain_column="language")
    assert documents(source) == [("en", "one"), ("49", "zwei")]


def test_a_folder_may_hold_json_lines_and_text_and_a_domain_column_leaves_text_to_its_file(tmp_path):
    rows(tmp_path, '{"text": "one", "source": "web"}')
    (tmp_path / "b.py").write_text("two = 2")
    assert documents(read_source(tmp_path)) == [("a", "one"), ("b", "two = 2")]
    assert documents(read_source(tmp_path, domain_column="source")) == [("web", "one"), ("b", "two = 2")]


def test_a_domain_column_without_tables_is_refused(two_domains):
    with pytest.raises(DataError, match="only text files, and they have no column 'lang'; leave"):
        read_source(two_domains, domain_column="lang")


GOOD = '{"text": "good", "lang": "en"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"txt": "a", "id": 1}',
            r"no column 'text', there are 'txt', 'id'; give the right one as data\.text_column; did you mean 'txt'\?",
        ),
        ("{}", "no column 'text', there are none"),
        ('{"text": "a"}', r"no column 'lang', there are 'text'; give the right one as data\.domain_column"),
        ('{"text": 5.5, "lang": "en"}', "column 'text' holds the number 5.5, not text"),
        ('{"text": true, "lang": "en"}', "column 'text' holds the truth value True, not text"),
        ('{"text": null, "lang": "en"}', r"column 'text' holds nothing \(null\), not text"),
        ('{"text": ["a"], "lang": "en"}', "column 'text' holds a list, not text"),
        ('{"text": {"a": 1}, "lang": "en"}', "column 'text' holds an object, not text"),
        ('{"text": "a", "lang": null}', r"column 'lang' holds nothing \(null\), not a domain's name"),
        ('{"text": "a", "lang": ""}', "column 'lang' holds an empty text, not a domain's name"),
        (
            '{"text": "a", "lang": "a\\nb"}',
            r"column 'lang' holds 'a\\nb'…, not a domain's name: one line of at most 200",
        ),
        ('{"text": "a", "lang": "\\ud83d"}', "column 'lang' holds .*, not a domain's name: one line"),
        (f'{{"text": "a", "lang": "{201 * "a"}"}}', "column 'lang' holds 'a{30}'…, not a domain's name: one line"),
        ('{"text": "a", "lang": "en"', "not JSON: Expecting ',' delimiter.*; every line must be one JSON object"),
        ('["a"]', "JSON, but not an object with columns"),
        ("[" * 100_000, "not JSON: .*recursion"),
        ('{"text": "a \\ud83d", "lang": "en"}', "column 'text' holds half a surrogate pair at character 2"),
        (b'{"text": "caf\xe9"}', "not UTF-8 at byte 13 of the line"),
    ],
)
def test_a_bad_line_is_named_with_its_number_in_whatever_unit_it_is(tmp_path, line, message):
    file = rows(tmp_path, *[GOOD] * 400, line, *[GOOD] * 3)
    for unit_size in (2**25, 100):
        with pytest.raises(DataError, match=rf"a\.jsonl: line 401: {message}") as caught:
            documents(read_source(file, domain_column="lang", unit_size=unit_size))
        assert "\n" not in str(caught.value)


def test_a_line_too_long_is_refused_without_reading_on(tmp_path, monkeypatch):
    file = rows(tmp_path, GOOD, '{"text": "' + "a" * 5_000_000 + '"}', GOOD)
    read = Counter()

    def counted(*args, **kwargs):
        for chunk in chunks(*args, size=10_000, **kwargs):
            read["bytes"] += len(chunk)
            yield chunk

    monkeypatch.setattr("himoe.data.text.formats.chunks", counted)
    with pytest.raises(DataError, match=r"a\.jsonl: line 2: more than 50,000 bytes; a line is one document: divide it"):
        list(read_json_lines(file, "a", columns=Columns(), longest=50_000))
    assert read["bytes"] < 100_000


def test_units_inside_a_long_line_read_no_further_than_themselves(tmp_path):
    file = rows(tmp_path, GOOD, json.dumps({"text": "a" * 1_000_000}), GOOD)
    units = read_source(file, unit_size=10_000).units
    assert [len(list(unit.documents())) for unit in units] == [2, *[0] * 99, 1]


@given(st.lists(st.binary(max_size=300), max_size=10), st.integers(1, 50))
def test_whatever_the_bytes_of_a_file_it_is_read_or_refused_in_one_line(tmp_path_factory, parts, unit_size):
    folder = tmp_path_factory.mktemp("odd")
    for i, content in enumerate(parts):
        (folder / f"{i}{('.txt', '.jsonl', '.txt.gz', '.txt.zst', '.parquet', '.arrow')[i % 6]}").write_bytes(content)
    try:
        documents(read_source(folder, unit_size=unit_size))
    except DataError as error:
        assert "\n" not in str(error)
        assert str(folder) in str(error)
