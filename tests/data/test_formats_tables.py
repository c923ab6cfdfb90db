import json
import sys
from pathlib import Path

import pytest

from himoe.data.text import Source, read_source
from himoe.errors import DataError, MissingExtraError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"document {i}\n" * (i % 7) for i in range(1000)]
WRITTEN = [text for text in TEXTS if text]


def documents(source: Source) -> list[tuple[str, str]]:
    return [document for unit in source.units for document in unit.documents()]


def texts(source: Source) -> list[str]:
    return [text for _, text in documents(source)]


def table(**columns):
    return pyarrow.table(columns or {"id": range(len(TEXTS)), "text": TEXTS})


def write(file: Path, rows, group: int = 100) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        parquet.write_table(rows, file, row_group_size=group)
    else:
        new = pyarrow.ipc.new_file if "indexed" in file.name else pyarrow.ipc.new_stream
        with pyarrow.OSFile(str(file), "wb") as sink, new(sink, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=group)
    return file


@pytest.fixture(params=["a.parquet", "a.arrow", "a.indexed.arrow"])
def file(request, tmp_path) -> Path:
    return tmp_path / request.param


def test_every_row_is_a_document_in_units_of_any_size(file):
    write(file, table())
    assert texts(read_source(file)) == WRITTEN
    units = read_source(file, unit_size=10_000).units
    assert len(units) > 3
    assert [text for unit in reversed(units) for _, text in reversed(list(unit.documents()))] == WRITTEN[::-1]
    assert sum(unit.size for unit in units) >= sum(map(len, WRITTEN))


def test_columns_name_the_text_and_the_domain(file):
    write(file, table(body=["a", "b"], text=["x", "y"], year=[1999, 2000]))
    assert documents(read_source(file, text_column="body", domain_column="year")) == [("1999", "a"), ("2000", "b")]


@pytest.mark.parametrize("kind", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
def test_text_may_be_stored_in_other_ways(file, kind):
    write(file, table(text=pyarrow.array(["a", "b", "a"]).cast(kind)))
    assert texts(read_source(file)) == ["a", "b", "a"]


def test_a_missing_column_is_named_with_those_there(file):
    write(file, table(content=["a"], Text=["b"]))
    with pytest.raises(
        DataError, match=r"\.(parquet|arrow): no column 'text', there are 'content', 'Text'; .*did you mean 'Text'"
    ):
        documents(read_source(file))


def test_two_columns_of_one_name_are_refused(file):
    write(file, pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"]))
    with pytest.raises(DataError, match=r'"text" exists 2 times'):
        documents(read_source(file))


@pytest.mark.parametrize(
    ("values", "what"),
    [([1], r"the number 1"), ([["a"]], "a list"), ([None], r"nothing \(null\)"), ([b"a"], "a value of")],
)
def test_a_value_that_is_no_text_is_named_with_its_row(file, values, what):
    write(file, table(text=values))
    with pytest.raises(DataError, match=rf"{file.name}: row 1: column 'text' holds {what}.*not text"):
        documents(read_source(file))


def test_rows_are_counted_over_units(file):
    write(file, table(text=[*TEXTS, None]))
    with pytest.raises(DataError, match="row 1001: column 'text' holds nothing"):
        documents(read_source(file, unit_size=10_000))


def test_a_damaged_file_is_named(file):
    whole = write(file, table()).read_bytes()
    for content in (whole[: len(whole) // 2], b"no rows at all " * 100, b""):
        file.write_bytes(content)
        with pytest.raises(
            DataError, match=rf"{file.name}: not a file of {file.suffix[1:]} rows, or a damaged one"
        ) as caught:
            documents(read_source(file))
        assert "\n" not in str(caught.value)


def test_a_damaged_page_is_named_when_it_is_met(tmp_path):
    content = bytearray(write(tmp_path / "a.parquet", table()).read_bytes())
    content[2000:5000] = bytes(3000)
    (tmp_path / "a.parquet").write_bytes(content)
    units = read_source(tmp_path / "a.parquet").units
    with pytest.raises(DataError, match=r"a\.parquet: not a file of parquet rows, or a damaged one"):
        [*units[0].documents()]


def test_a_compressed_table_and_a_missing_library_are_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet.gz").write_bytes(b"any")
    with pytest.raises(
        DataError, match=r"a\.parquet\.gz \(parquet inside \.gz, which cannot be read in parts: decompress"
    ):
        documents(read_source(tmp_path / "a.parquet.gz"))
    write(tmp_path / "b.parquet", table())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pyarrow is not installed; .*himoe\[data\]"):
        documents(read_source(tmp_path / "b.parquet"))


def saved(folder: Path, *parts: list[str], **state) -> None:
    """Write what `Dataset.save_to_disk` writes."""
    names = [f"data-{i:05}-of-{len(parts):05}.arrow" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        write(folder / name, table(text=part))
    (folder / "dataset_info.json").write_text('{"features": {}}')
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], **state}))


def test_a_saved_dataset_is_one_domain_of_the_files_it_lists(tmp_path):
    saved(tmp_path / "wiki", ["a", "b"], ["c"])
    write(tmp_path / "wiki" / "cache-123.arrow", table(text=["left over"]))
    assert documents(read_source(tmp_path / "wiki")) == [("wiki", "a"), ("wiki", "b"), ("wiki", "c")]
    (tmp_path / "notes.txt").write_text("beside it")
    assert documents(read_source(tmp_path)) == [("notes", "beside it"), *[("wiki", text) for text in "abc"]]


def test_of_a_saved_dataset_with_splits_the_train_split_is_read(tmp_path):
    folder = tmp_path / "wiki"
    saved(folder / "train", ["a"])
    saved(folder / "test", ["b"])
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert documents(read_source(folder)) == [("wiki", "a")]
    assert documents(read_source(folder / "test")) == [("test", "b")]
    (folder / "dataset_dict.json").write_text('{"splits": ["test"]}')
    with pytest.raises(
        DataError, match=r"wiki: a dataset without a split 'train', it has 'test'; .*such as .*wiki/test"
    ):
        read_source(folder)


def test_a_broken_saved_dataset_is_refused(tmp_path):
    saved(tmp_path, ["a"], ["b"], _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(DataError, match="picked by an index; save it after flatten_indices"):
        read_source(tmp_path)
    saved(tmp_path, ["a"], ["b"])
    (tmp_path / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"lacks its file data-00001-of-00002\.arrow"):
        read_source(tmp_path)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state\.json: not JSON"):
        read_source(tmp_path)


@pytest.mark.parametrize("names", [("train-00000-of-00001", "test-00000-of-00001"), ("train/0000", "validation/0000")])
def test_of_a_folder_as_on_a_hub_the_train_split_is_read(tmp_path, names):
    folder = tmp_path / "stories"
    for name, text in zip(names, ["wanted", "other"], strict=True):
        write(folder / "data" / f"{name}.parquet", table(text=[text]))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert documents(read_source(folder)) == [("stories", "wanted")]


def test_of_configurations_as_on_a_hub_each_is_a_domain(tmp_path):
    for language in ("de", "en"):
        for split in ("train", "test"):
            write(tmp_path / language / f"{split}-00000-of-00001.parquet", table(text=[f"{language} {split}"]))
    (tmp_path / "README.md").write_text("about")
    assert documents(read_source(tmp_path)) == [("de", "de train"), ("en", "en train")]


def test_a_hub_folder_may_have_its_files_beside_the_card_or_no_splits(tmp_path):
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    (tmp_path / "README.md").write_text("about")
    assert texts(read_source(tmp_path)) == ["train.jsonl"]
    (tmp_path / "notes.txt").write_text("a text makes it an ordinary folder")
    assert [domain for domain, _ in documents(read_source(tmp_path))] == ["README", "notes", "test", "train"]
    write(tmp_path / "b" / "data" / "part1.parquet", table(text=["one"]))
    write(tmp_path / "b" / "data" / "part2.parquet", table(text=["two"]))
    assert documents(read_source(tmp_path / "b")) == [("b", "one"), ("b", "two")]


@pytest.mark.parametrize("name", ["train", "training", "train-timetables", "train2"])
def test_a_folder_of_tables_of_which_one_is_named_like_a_split_is_an_ordinary_one(tmp_path, name):
    for place in (tmp_path / "flat", tmp_path / "deeper" / "data"):
        place.mkdir(parents=True)
        for stem in ("code", name, "test"):
            (place / f"{stem}.jsonl").write_text(json.dumps({"text": stem}))
    assert documents(read_source(tmp_path / "flat")) == [(stem, stem) for stem in sorted(["code", name, "test"])]
    assert sorted(documents(read_source(tmp_path / "deeper"))) == [("data", "code"), ("data", "test"), ("data", name)]


@pytest.mark.parametrize(
    "other",
    ["test-00000-of-00002", "valid", "validation_matched", "val", "dev2", "eval.clean", "held_out", "test/0000"],
)
def test_the_usual_names_of_splits_are_known(tmp_path, other):
    flat = [] if "/" in other else [tmp_path / "flat"]
    for folder in [*flat, tmp_path / "deeper" / "data"]:
        for name in ("train-00000-of-00002", "train-00001-of-00002", other):
            write(folder / f"{name}.parquet", table(text=[name]))
    for folder in [*flat, tmp_path / "deeper"]:
        found = documents(read_source(folder))
        assert found == [(folder.name, f"train-0000{i}-of-00002") for i in range(2)]


def test_tables_beside_a_folder_called_data_are_not_all_there_is(tmp_path):
    for name in ("train.parquet", "data/more.parquet"):
        write(tmp_path / name, table(text=[name]))
    assert documents(read_source(tmp_path)) == [("data", "data/more.parquet"), ("train", "train.parquet")]


def test_numbered_parts_of_a_file_are_one_domain_and_a_card_beside_tables_is_none(tmp_path):
    for i in range(2):
        write(tmp_path / f"web-0000{i}-of-00002.parquet", table(text=[str(i)]))
    write(tmp_path / "books.parquet", table(text=["b"]))
    (tmp_path / "README.md").write_text("about")
    assert documents(read_source(tmp_path)) == [("books", "b"), ("web", "0"), ("web", "1")]
