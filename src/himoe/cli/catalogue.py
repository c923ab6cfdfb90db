"""What the tables hold, read from the source text of each entry, so that PyTorch need not be imported."""

import ast
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import himoe
from himoe.config import recipe_description, recipe_names, recipe_text
from himoe.errors import ConfigError, nearest
from himoe.registry import TABLES

KINDS = (*TABLES, "recipes")
LINE = 80


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
            return Details(name, text.partition("\n")[0], where, _signature(node, tree), text)
    return Details(name, "", where, "", "")


def _signature(node: ast.ClassDef | ast.FunctionDef, tree: ast.Module) -> str:
    """Return `Name(argument: type = default, …)`, for a class that of its constructor."""
    call = _constructor(node, tree) if isinstance(node, ast.ClassDef) else node
    if call is None:
        return node.name
    call.args.args = [argument for argument in call.args.args if argument.arg != "self"]
    line = f"{node.name}({ast.unparse(call.args)})"
    return line if len(line) <= LINE else "\n    ".join([f"{node.name}(", *_arguments(call.args)]) + "\n)"


def _constructor(node: ast.ClassDef, tree: ast.Module) -> ast.FunctionDef | None:
    """Return the `__init__` of a class or of the bases that stand in the same file."""
    own = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
    bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
    parents = [item for item in tree.body if isinstance(item, ast.ClassDef) and item.name in bases]
    return own[0] if own else next(filter(None, (_constructor(parent, tree) for parent in parents)), None)


def _arguments(args: ast.arguments) -> list[str]:
    """Return each argument as it is written, with its type and default."""
    required = [None] * (len(args.args) - len(args.defaults))
    shown = [_argument(*pair) for pair in zip(args.args, [*required, *args.defaults], strict=True)]
    if args.vararg or args.kwonlyargs:
        shown.append(f"*{ast.unparse(args.vararg) if args.vararg else ''}")
    shown += [_argument(*pair) for pair in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    if args.kwarg:
        shown.append(f"**{ast.unparse(args.kwarg)}")
    return [f"{argument}," for argument in shown]


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(argument) + (f" = {ast.unparse(default)}" if default else "")
