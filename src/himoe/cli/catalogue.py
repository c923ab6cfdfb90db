"""What the tables hold, a line for each entry, read from source text so that PyTorch need not be imported."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass

from himoe.cli.docstrings import first_line, papers, read_unimported
from himoe.config import recipe_description, recipe_names, recipe_text
from himoe.errors import ConfigError, nearest
from himoe.registry import TABLES

KINDS = (*TABLES, "recipes")
SINGULAR = {"experts": "kind of experts"} | {kind: kind.removesuffix("s") for kind in KINDS if kind != "experts"}


@dataclass(frozen=True)
class Entry:
    """One line of `himoe list`: its name, what it is, where it is defined, its paper's arXiv number or another source.

    A recipe has the one that it lies over instead of a paper.
    """

    name: str
    description: str
    where: str
    paper: str | None = None
    base: str | None = None


def entries(kind: str) -> list[Entry]:
    """Return all entries of a table, in its order; a recipe is followed by those that lie over it."""
    if kind == "recipes":
        return _recipes({name: tomllib.loads(recipe_text(name)).get("recipe") for name in names(kind)})
    return [_entry(name, TABLES[kind][name]) for name in names(kind)]


def _entry(name: str, where: str) -> Entry:
    doc, opening = read_unimported(where)
    return Entry(name, first_line(doc), where, next(iter(papers(doc, opening)), None))


def _recipes(bases: Mapping[str, str | None], base: str | None = None) -> list[Entry]:
    """Return the recipes over `base`, each followed by those over it."""
    found = []
    for name in (name for name, below in bases.items() if below == base):
        found.append(Entry(name, recipe_description(name), f"himoe/recipes/{name}.toml", base=base))
        found += _recipes(bases, name)
    return found


def names(kind: str) -> list[str]:
    """Return the names in a table, or raise `ConfigError` with the nearest one."""
    if kind not in KINDS:
        raise ConfigError(f"no table {kind!r}; known: {', '.join(KINDS)}{nearest(kind, KINDS)}")
    return recipe_names() if kind == "recipes" else list(TABLES[kind])


def table_of(name: str, kind: str | None = None) -> str:
    """Return the table that `name` stands in: `kind` if it does there, else the one other table that has it.

    A name of the form `"package.module:Class"` is a reader's own, and stands in any table.

    Raises:
        ConfigError: a name that no table has, with the nearest one, or that several have, with the ways to each, or one
            of a table.
    """
    if name in KINDS:
        raise ConfigError(f"{name} is a table: himoe list {name}")
    known = names(kind) if kind else []
    if kind and (name in known or (":" in name and kind != "recipes")):
        return kind
    if not kind and ":" in name:
        raise ConfigError(f"{name}: say which table it is for, as in himoe list balancers {name}; {', '.join(TABLES)}")
    found = [table for table in KINDS if name in names(table)]
    if len(found) == 1:
        return found[0]
    if found:
        ways = " or ".join(f"himoe list {table} {name}" for table in found)
        where = f"not in {kind}, but in" if kind else "in"
        raise ConfigError(f"{name} stands {where} {' and '.join(found)}: {ways}")
    every = {other: f"{table} {other}" for table in KINDS for other in names(table)}
    if kind:
        raise ConfigError(
            f"no entry {name!r} in {kind}; known: {', '.join(known)}{nearest(name, known) or nearest(name, every)}"
        )
    known = {table: table for table in KINDS} | every
    raise ConfigError(f"no table and no entry {name!r}; tables: {', '.join(KINDS)}{nearest(name, known)}")
