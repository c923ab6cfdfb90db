"""Which files of a folder are read, and as which domains.

A file is one domain, named by its stem; files `NAME-00000-of-00002…` are parts of one. In a folder every first-level
sub-folder or file is a domain. Hidden entries are left out. A folder that holds a dataset is one domain, and only the
files of that dataset are read:

- as `datasets` saves one: `state.json` and the Arrow files that it lists; with several splits, `dataset_dict.json` and
  a sub-folder for each;
- as hubs give one: Parquet, Arrow or JSON lines files in `data/`, or `train…` files of these kinds; a `README` or
  `LICENSE` beside tables only is about them and not data.

Of a dataset with splits the one called `train` is read; to read another, name its folder or file. Files count as splits
only if all of them are named like one: `train` beside `news` is a domain as `news` is.
"""

import json
import re
from itertools import chain
from pathlib import Path

from himoe.data.text.formats import form
from himoe.errors import DataError

SHARD = re.compile(r"-\d{5}-of-\d{5}$")
CARD = re.compile(r"(README|LICENSE|CITATION|NOTICE)(\..*)?$|dataset_infos?\.json$")  # beside tables
TRAIN = re.compile(r"train(ing)?([-_.]?\d.*|[-.].*)?$")
SPLITS = "test(ing)?|val(id(ation)?)?|dev(el(opment)?)?|eval(uation)?|held[-_]?out|holdout|unsupervised"
OTHER = re.compile(rf"({SPLITS})([-_.]?\d.*|[-_.].*)?$")


def domains(path: Path) -> dict[str, list[Path]]:
    """Return the files of every domain, both in name order; a file or a dataset is one domain.

    Raises `DataError` where there is nothing to read or two entries give one domain.
    """
    if path.is_file():
        return {_name(path): [path]}
    if not path.is_dir():
        reason = "neither a file nor a folder" if path.exists() else "no such file or folder"
        raise DataError(f"{path}: {reason}; give a UTF-8 text file, a table with a column of text, or a folder of them")
    if dataset := _dataset(path):
        return {path.resolve().name: dataset}
    found: dict[str, list[Path]] = {}
    for entry in _entries(path):
        name, files = (entry.name, _files(entry)) if entry.is_dir() else (_name(entry), [entry] * entry.is_file())
        if files and name in found and not (SHARD.search(form(entry)[2]) and SHARD.search(form(found[name][0])[2])):
            raise DataError(f"{path}: two entries give the domain {name!r}, one is {entry.name}; rename one of them")
        if files:
            found.setdefault(name, []).extend(files)
    if all(CARD.match(file.name) or _is_table(file) for files in found.values() for file in files):
        found = {name: rest for name, files in found.items() if (rest := list(filter(_is_table, files)))} or found
    if not found:
        raise DataError(f"{path}: holds no files; put text files in it, each file or sub-folder is one domain")
    return found


def _files(folder: Path) -> list[Path]:
    """Return the files under a folder in name order: those of datasets, and elsewhere every regular file."""
    if dataset := _dataset(folder):
        return dataset
    found = []
    for entry in _entries(folder):
        if entry.is_dir():
            found += [] if entry.is_symlink() else _files(entry)  # a link could lead back here
        elif entry.is_file():
            found.append(entry)
    return found


def _dataset(folder: Path) -> list[Path]:
    """Return the files of the dataset that a folder holds, none where it is an ordinary folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits", [])
        if "train" not in splits:
            raise DataError(
                f"{folder}: a dataset without a split 'train', it has {', '.join(map(repr, splits)) or 'none'}; "
                f"give the folder of one split, such as {folder / str([*splits, 'NAME'][0])}"
            )
        return _dataset(folder / "train")
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _saved(folder)
    return _from_hub(folder)


def _saved(folder: Path) -> list[Path]:
    """Return the Arrow files that `save_to_disk` of `datasets` wrote into a folder."""
    state = _json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: the rows of this dataset are picked by an index; save it after flatten_indices()")
    files = [folder / str(entry.get("filename")) for entry in state.get("_data_files") or []]
    if missing := [file.name for file in files if not file.is_file()]:
        raise DataError(f"{folder}: the dataset lacks its file {missing[0]}; copy the whole folder again")
    return files


def _from_hub(folder: Path) -> list[Path]:
    """Return the tables of a folder laid out as on a hub, those of the split `train` where there are splits."""
    entries = [entry for entry in _entries(folder) if not CARD.match(entry.name)]
    if [(entry.name, entry.is_dir()) for entry in entries] == [("data", True)]:
        below = _files(entries[0])
        tables = below if all(map(_is_table, below)) else []
        names = {file: [*file.relative_to(entries[0]).parent.parts, form(file)[2]] for file in tables}
        return _train(names) if any(map(TRAIN.match, chain(*names.values()))) else tables
    return _train({entry: [form(entry)[2]] for entry in entries}) if all(map(_is_table, entries)) else []


def _train(names: dict[Path, list[str]]) -> list[Path]:
    """Return the files of the split `train`, none where one of them is named like no split."""
    train = [file for file, parts in names.items() if any(map(TRAIN.match, parts))]
    others = [file for file, parts in names.items() if any(map(OTHER.match, parts))]
    return train if len({*train, *others}) == len(names) else []


def _entries(folder: Path) -> list[Path]:
    """Return what is in a folder, in name order, without hidden entries."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _is_table(path: Path) -> bool:
    """Say whether a path is a file of rows."""
    return form(path)[0] != "text" and path.is_file()


def _name(file: Path) -> str:
    """Return the domain that a file is: its name without endings and without the number of a part."""
    return SHARD.sub("", form(file)[2])


def _json(file: Path) -> dict:
    """Read a JSON object that describes a dataset."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not JSON: {error}; copy the dataset again") from error
    if not isinstance(value, dict):
        raise DataError(f"{file}: not a JSON object; copy the dataset again")
    return value
