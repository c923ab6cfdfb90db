"""What the tables hold, read from the source text of each entry, so that PyTorch need not be imported."""

import ast
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import himoe
from himoe.config import recipe_description, recipe_names, recipe_text
from himoe.errors import ConfigError
from himoe.registry import TABLES, nearest

KINDS = (*TABLES, "recipes")


@dataclass(frozen=True)
class Entry:
    """One line of `himoe list`: its name, what it is in a line, and where it is defined."""

    name: str
    description: str
    where: str


@dataclass(frozen=True)
class Details(Entry):
    """An entry in full: how it is called, or a recipe's text, and its whole docstring."""

    signature: str
    text: str


def entries(kind: str) -> list[Entry]:
    """Return all entries of a table, in its order."""
    return [Entry(full.name, full.description, full.where) for full in map(_read(kind), names(kind))]


def details(kind: str, name: str) -> dict[str, str]:
    """Return one entry in full, or raise `ConfigError` with the nearest name."""
    known = names(kind)
    if name not in known:
        raise ConfigError(f"no entry {name!r} in {kind}; known: {', '.join(known)}{nearest(name, known)}")
    return asdict(_read(kind)(name))


def names(kind: str) -> list[str]:
    """Return the names in a table, or raise `ConfigError` with the nearest table."""
    if kind not in KINDS:
        raise ConfigError(f"no table {kind!r}; known: {', '.join(KINDS)}{nearest(kind, list(KINDS))}")
    return recipe_names() if kind == "recipes" else list(TABLES[kind])


def _read(kind: str) -> Callable[[str], Details]:
    return _recipe if kind == "recipes" else lambda name: _definition(name, TABLES[kind][name])


def _recipe(name: str) -> Details:
    return Details(name, recipe_description(name), f"himoe/recipes/{name}.toml", "", recipe_text(name))


def _definition(name: str, where: str) -> Details:
    """Find the class or function that `"module:Name"` means, without importing it."""
    module, _, attribute = where.partition(":")
    source = Path(himoe.__file__ or "").parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    tree = ast.parse(source.read_text(encoding="utf-8")) if source.is_file() else ast.Module([], [])
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute:
            text = ast.get_docstring(node) or ""
            return Details(name, text.partition("\n")[0], where, _signature(node), text)
    return Details(name, "", where, "", "")


def _signature(node: ast.ClassDef | ast.FunctionDef) -> str:
    """Return `Name(argument: type = default, …)`, for a class that of its constructor."""
    call = node
    if isinstance(node, ast.ClassDef):
        methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
        call = next((method for method in methods if method.name == "__init__"), None)
    if not isinstance(call, ast.FunctionDef):
        return f"{node.name}()"
    arguments = ast.unparse(call.args).removeprefix("self").removeprefix(", ")
    return f"{node.name}({arguments})"
