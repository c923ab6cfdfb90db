"""Docstrings as data: the papers they name, their prose, what they say of arguments; read unimported where asked."""

import ast
import functools
import inspect
import re
import textwrap
from pathlib import Path

import himoe

ARXIV = re.compile(r"(?<![\d.])\d{4}\.\d{4,5}(?![\d.])")
SECTION = re.compile(r"(Args|Returns|Yields|Raises|Warns|Attributes):$")


@functools.cache
def _parsed(module: str) -> ast.Module:
    place = Path(himoe.__file__ or "").parent.joinpath(*module.split(".")[1:])
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def read_unimported(where: str) -> tuple[str, str]:
    """Return the docstrings of one of our own `"module:Name"` and of its file, without importing PyTorch."""
    module, _, name = where.partition(":")
    tree = _parsed(module)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return ast.get_docstring(node) or "", ast.get_docstring(tree) or ""
        if isinstance(node, ast.ImportFrom) and node.module:
            known = {alias.asname or alias.name: alias.name for alias in node.names}
            if name in known:
                return read_unimported(f"{node.module}:{known[name]}")
    return "", ast.get_docstring(tree) or ""


def own_doc(entry: object) -> str:
    """Return the docstring of a class or function itself, never the one that a class inherits."""
    return inspect.cleandoc(vars(entry).get("__doc__") or "") if inspect.isclass(entry) else inspect.getdoc(entry) or ""


def papers(doc: str, opening: str) -> list[str]:
    """Return the arXiv numbers that an entry names, those of its own docstring before those of its file's.

    Where there is none, what stands in brackets in the first line of the file, if it names a year or a web address.

    >>> papers("As in (2412.19437).", "Of DeepSeek (arXiv 2401.06066), version 2.5")
    ['2412.19437', '2401.06066']
    >>> papers("A bias.", "Some Balancing (Sun et al. 2026; and others): a bias (of ours).")
    ['Sun et al. 2026']
    """
    if numbers := ARXIV.findall(f"{doc}\n{opening}"):
        return list(dict.fromkeys(numbers))
    brackets = re.findall(r"\(([^()]*)\)", opening.partition("\n")[0])
    return [source.partition(";")[0] for source in brackets if re.search(r"\b(19|20)\d\d\b|\w\.[a-z]{2,3}\b", source)][
        :1
    ]


def first_line(doc: str) -> str:
    r"""Return the first line without the arXiv numbers in its brackets, which are told beside it.

    >>> first_line("The best in every group (MoGE, arXiv 2505.21411).\n\nMore.")
    'The best in every group (MoGE).'
    """
    line = doc.partition("\n")[0]
    line = re.sub(rf",? *(?:arXiv:? *)?{ARXIV.pattern}(?=[),;])", "", line)
    return re.sub(r" *\( *\)", "", line)


def sections(doc: str) -> tuple[list[str], dict[str, str]]:
    r"""Return the blocks of a docstring's text after its first line, and what its `Args` say, by name.

    >>> sections("First.\n\nMore\nof it.\n\nArgs:\n    a: one\n        thing.\n    **b: as `c`.\n\nState: none.")
    (['More\nof it.', 'State: none.'], {'a': 'one thing.', '**b': 'as `c`.'})
    """
    text, arguments = [], {}
    for block in re.split(r"\n\s*\n", doc.partition("\n")[2].strip("\n")):
        head, _, body = block.partition("\n")
        if not (section := SECTION.match(head)):
            text += [block] if block.strip() else []
        elif section[1] == "Args":
            arguments = _arguments(body)
    return text, arguments


def _arguments(body: str) -> dict[str, str]:
    found, name = {}, ""
    for line in textwrap.dedent(body).splitlines():
        if not line.startswith(" "):
            name, _, meaning = line.partition(":")
            found[name := name.strip()] = meaning.strip()
        elif name:
            found[name] += f" {line.strip()}"
    return found
