"""The embedded corpus: text that every machine with this package already holds, so that training needs no download.

- `code`: the standard library's source, and a bounded part of the source of packages this one depends on;
- `tests`: the standard library's tests; where a slim Python lacks them, the tests that other packages ship;
- `prose`: Python's reference topics, and docstrings of packages that are not part of `code`.

Files are read, never imported. Text that mostly repeats lines met elsewhere is left out, so that what is held out is no
copy of what is trained on; so are tables of numbers. The corpus follows the versions installed.
"""

import ast
import contextlib
import hashlib
import importlib.util
import inspect
import os
import re
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from pathlib import Path

from himoe.data.preparation.split import digest
from himoe.data.text.cutting import cut
from himoe.data.text.sources import Source, Unit
from himoe.errors import DataError

RULES = 1  # raise when what is read or how it is cut changes

CODE_PACKAGES = ("pydantic", "rich", "jinja2", "fsspec", "tyro")
TEST_PACKAGES = ("networkx", "numpy", "sympy")  # only where the standard library's tests are missing
PROSE_PACKAGES = ("torch", "numpy", "networkx", "huggingface_hub")
# The parts of torch that document its interface; the rest is long to read and short of prose.
PARTS = {
    "torch": ("amp", "autograd", "cuda", "distributed", "distributions", "fft", "func", "fx", "linalg", "nn", "optim",
              "sparse", "special", "utils"),
}  # fmt: skip
TEST_FOLDERS = {"test", "tests", "idle_test"}
SKIPPED = {"__pycache__", "site-packages", "dist-packages", "encodings", "pydoc_data", "ensurepip", "_vendor"}

LIMITS = {"code": 9 * 2**20, "tests": 9 * 2**20, "prose": 8 * 2**20}  # bytes
PACKAGES_LIMIT = 2 * 2**20  # bytes of packages' source within `code`
HELD_OUT = 288 * 1024  # bytes held out of every domain at least
SHORTEST = 200  # characters of a docstring worth reading, and of a document
UNIT = 2**20  # characters of a unit, about
LONG_LINE = 30  # characters from which on a line tells one text from another
TABLE_DIGITS = 0.1  # share of digits from which on a text is a table
BREAK = "\n\n\n"  # between the docstrings of a module; inside one there are never so many line ends in a row


def embedded_source() -> Source:
    """Return the embedded corpus as a source; raises `DataError` where this Python has no readable source files."""
    files = _source_files()
    digest = hashlib.sha256(repr((RULES, LIMITS)).encode())
    for domain, found in files.items():
        stats = [file.stat() for file in found]
        if domain in LIMITS and sum(stat.st_size for stat in stats) < 4 * HELD_OUT:
            raise DataError(
                f"the embedded corpus lacks text for {domain!r}: this Python has too few readable source files; "
                "give your own text with data.path (--data PATH)"
            )
        for file, stat in zip(found, stats, strict=True):
            digest.update(repr((domain, str(file), stat.st_size, stat.st_mtime_ns)).encode())
    return Source("embedded", partial(_units, files), digest.hexdigest(), minimum_held_out=HELD_OUT)


def _units(files: dict[str, list[Path]]) -> list[Unit]:
    """Return units that carry their documents, as which these are is found over all files together."""
    units = []
    for domain, found in documents(_texts(files)).items():
        group: list[tuple[str, str]] = []
        for i, text in enumerate(found):
            group.append((domain, text))
            if sum(len(text) for _, text in group) >= UNIT or i == len(found) - 1:
                label = f"{domain}, documents {i + 2 - len(group)} to {i + 1}"
                size = sum(len(text.encode()) for _, text in group)
                units.append(Unit(label, size, (partial(iter, tuple(group)),)))
                group = []
    return units


def docstrings(source: str) -> Iterator[str]:
    r"""Yield the docstrings of Python source, the texts it hands to functions that attach them, and pydoc's topics.

    >>> list(docstrings("def f():\n    'Return one.'\nadd_docstr(f, 'Text.')"))
    ['Return one.', 'Text.']
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in _statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield _tidy(text)
        elif isinstance(node, ast.Assign | ast.Expr) and _attaches_documentation(node):
            yield from map(_tidy, _strings(node.value))


def documents(texts: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the documents of every domain, made of its files' texts: no repeats, no tables, within the limits.

    A document of `prose` is a module's docstrings one after the other.
    """
    units = [
        (domain, i, part) for domain in ("code", "tests") for i, text in enumerate(texts[domain]) for part in cut(text)
    ]
    units += [
        ("prose", i, text)
        for i, module in enumerate(texts["prose"])
        for text in docstrings(module)
        if len(text) >= SHORTEST
    ]
    found: dict[str, list[str]] = {"code": [], "tests": []}
    modules: dict[int, list[str]] = {}
    for domain, i, text in _without_repeats(units):
        (modules.setdefault(i, []) if domain == "prose" else found[domain]).append(text)
    found["prose"] = [part for module in modules.values() for part in cut(BREAK.join(module))]
    return {
        domain: _bounded((text for text in found[domain] if len(text) >= SHORTEST and not _is_table(text)), limit)
        for domain, limit in LIMITS.items()
    }


def _source_files() -> dict[str, list[Path]]:
    """Return the files that every domain is made of, in a fixed order, and those of packages within `code`."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    files = list(_python_files(stdlib))
    tests = [file for file, is_test in files if is_test]
    if sum(file.stat().st_size for file in tests) < LIMITS["tests"] // 4:
        tests += [file for name in TEST_PACKAGES for file in _package(name, tests=True)]
    topics = [file for file in [stdlib / "pydoc_data" / "topics.py"] if file.is_file()]
    return {
        "code": [file for file, is_test in files if not is_test],
        "packages": [file for name in CODE_PACKAGES for file in _package(name)],
        "tests": tests,
        "prose": [*topics, *(file for name in PROSE_PACKAGES for file in _package(name))],
    }


def _texts(files: dict[str, list[Path]]) -> dict[str, list[str]]:
    """Return the texts of every domain's files."""
    texts = {domain: _read(found) for domain, found in files.items()}
    texts["code"] += _bounded(texts.pop("packages"), PACKAGES_LIMIT)
    return texts


def _package(name: str, *, tests: bool = False) -> list[Path]:
    """Return the source or the test files of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    roots = (spec and spec.submodule_search_locations) or []
    files = [found for root in roots for found in _python_files(Path(root), PARTS.get(name, ()))]
    return [file for file, is_test in files if is_test == tests]


def _python_files(root: Path, parts: Collection[str] = ()) -> Iterator[tuple[Path, bool]]:
    """Yield the Python files under `root`, or its top level and its folders `parts`, and whether each is a test."""
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        wanted = parts if parts and here == root else folders
        folders[:] = sorted(set(folders).intersection(wanted) - SKIPPED)
        is_test = bool(TEST_FOLDERS.intersection(here.relative_to(root).parts))
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):  # that one holds this machine's paths
                yield here / name, is_test


def _read(files: Iterable[Path]) -> list[str]:
    """Return the text of every file that is UTF-8; the standard library's tests have some that are not, on purpose."""
    texts = []
    for file in files:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            texts.append(file.read_bytes().decode())
    return [text for text in texts if "\0" not in text]


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield a module and, in order, all statements in it; much faster than visiting every expression."""
    yield tree
    for statement in getattr(tree, "body", ()):
        yield from _statements(statement)


def _attaches_documentation(statement: ast.Assign | ast.Expr) -> bool:
    """Say whether a statement attaches documentation, like `add_docstr(f, "…")`, or is the table of pydoc's topics."""
    if isinstance(statement.value, ast.Call):
        function = statement.value.func
        return "doc" in str(getattr(function, "attr", getattr(function, "id", "")))
    return isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == "topics"


def _strings(tree: ast.AST) -> Iterator[str]:
    """Yield the string constants of an expression."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _tidy(text: str) -> str:
    """Return a docstring without its indentation and without runs of blank lines."""
    return re.sub(r"\n\s*\n\s*\n", "\n\n", inspect.cleandoc(text))


def _without_repeats(units: list[tuple[str, int, str]]) -> list[tuple[str, int, str]]:
    """Drop every text at least half of whose long lines were met in others, prose last and longer texts first.

    So of a text and a part of it the part goes, and so does a docstring that stands in `code` as well.
    """
    seen: set[str] = set()
    kept = []
    rank = [(domain == "prose", -len(text), digest(text)) for domain, _, text in units]
    for i in sorted(range(len(units)), key=rank.__getitem__):
        lines = {line for line in map(str.strip, units[i][2].splitlines()) if len(line) >= LONG_LINE}
        if 2 * len(lines - seen) > len(lines):
            kept.append(i)
        seen |= lines
    return [units[i] for i in sorted(kept)]


def _bounded(texts: Iterable[str], limit: int) -> list[str]:
    """Return texts of together about `limit` bytes, in the given order, chosen by their hashes.

    The hashes are read backwards: the split takes the lowest, which would all be here.
    """
    texts = list(texts)
    size, chosen = 0, set()
    for text in sorted(set(texts), key=lambda text: digest(text)[::-1]):
        if size < limit:
            chosen.add(text)
            size += len(text.encode())
    return [text for text in texts if text in chosen]


def _is_table(text: str) -> bool:
    """Say whether a text is mostly numbers."""
    return sum(map(text.count, "0123456789")) > TABLE_DIGITS * len(text)
