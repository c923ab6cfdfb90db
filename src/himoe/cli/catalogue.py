"""What the tables hold.

The lines of a table are read from source text, so that PyTorch need not be imported; an entry in full is imported.
"""

import ast
import inspect
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import himoe
from himoe.config import recipe_description, recipe_names, recipe_text
from himoe.errors import ConfigError, nearest
from himoe.registry import TABLES, load

KINDS = (*TABLES, "recipes")
LINE = 80
# Arguments that the configuration's other keys and the layer itself settle; the rest are an entry's options.
SETTLED = {"dim", "hidden_dim", "num_experts", "num_groups", "groups", "selection_groups", "top_k", "k",
           "backend", "context", "extra", "force", "logits", "scores"}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One line of `himoe list`: its name, what it is in a line, where it is defined, the recipe that it lies over."""

    name: str
    description: str
    where: str
    base: str | None = None


@dataclass(frozen=True)
class Details(Entry):
    """An entry in full: its options and its whole docstring, or a recipe's text."""

    signature: str = ""
    text: str = ""


def entries(kind: str) -> list[Entry]:
    """Return all entries of a table, in its order; a recipe is followed by those that lie over it."""
    if kind == "recipes":
        return _recipes({name: tomllib.loads(recipe_text(name)).get("recipe") for name in names(kind)})
    return [Entry(name, _first_line(TABLES[kind][name]), TABLES[kind][name]) for name in names(kind)]


def _recipes(bases: Mapping[str, str | None], base: str | None = None) -> list[Entry]:
    """Return the recipes over `base`, each followed by those over it."""
    found = []
    for name in (name for name, below in bases.items() if below == base):
        found.append(Entry(name, recipe_description(name), f"himoe/recipes/{name}.toml", base))
        found += _recipes(bases, name)
    return found


def details(kind: str, name: str) -> dict[str, str]:
    """Return one entry in full, or raise `ConfigError` with the nearest name."""
    known = names(kind)
    if name not in known:
        raise ConfigError(f"no entry {name!r} in {kind}; known: {', '.join(known)}{nearest(name, known)}")
    entry = next(entry for entry in entries(kind) if entry.name == name)
    if kind == "recipes":
        return asdict(Details(**asdict(entry), text=recipe_text(name)))
    found = load(kind, name)
    return asdict(Details(**asdict(entry), signature=_signature(found), text=inspect.getdoc(found) or ""))


def names(kind: str) -> list[str]:
    """Return the names in a table, or raise `ConfigError` with the table that is meant."""
    if kind in KINDS:
        return recipe_names() if kind == "recipes" else list(TABLES[kind])
    if tables := [table for table in KINDS if kind in names(table)]:
        ways = " or ".join(f"himoe list {table} {kind}" for table in tables)
        raise ConfigError(f"{kind} stands in {' and '.join(tables)}: {ways}")
    raise ConfigError(f"no table {kind!r}; known: {', '.join(KINDS)}{nearest(kind, KINDS)}")


def _first_line(where: str) -> str:
    """Return the first line of the docstring of what `"module:Name"` means, without importing it."""
    module, _, attribute = where.partition(":")
    source = Path(himoe.__file__ or "").parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


def _signature(entry: Any) -> str:
    """Return `name(option: type = default, …)` with the options that a configuration can give."""
    parameters = inspect.signature(entry).parameters.values()
    options = [str(option).replace("'", '"') for option in parameters if option.name not in SETTLED]
    line = f"{entry.__name__}({', '.join(options)})"
    return line if len(line) <= LINE else "\n    ".join([f"{entry.__name__}(", *(f"{o}," for o in options)]) + "\n)"
