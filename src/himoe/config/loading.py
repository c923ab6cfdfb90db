"""From recipe, file and command line to one `Config`: defaults < recipe < file < `--set a.b=c`.

A recipe may lie over another one, as a file does. Tables merge key by key, everything else is replaced. Keys that only
make sense together are retired together: a layer that names another preset, say, drops the options of the preset before
it.
"""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel

from himoe.config.recipes import DEFAULT_RECIPE, recipe_text
from himoe.config.schema import Config
from himoe.config.toml import split_assignment
from himoe.errors import ConfigError, nearest

# A layer that sets the key on the left, to anything but none or an empty list, drops what lower layers said about those
# on the right.
RETIRES = {
    "data.path": ("data.sources", "data.weights"),
    "data.sources": ("data.path", "data.domain_column"),
    "moe.preset": (
        "moe.options",
        "moe.balancers",
        "moe.selector",
        "moe.selector_options",
        "moe.score",
        "moe.gate",
        "moe.gate_options",
    ),
    "moe.selector": ("moe.preset", "moe.options", "moe.score", "moe.selector_options"),
    "moe.gate": ("moe.gate_options",),
    "moe.pools": ("moe.num_experts", "moe.experts"),
    "moe.groups": ("moe.num_groups", "moe.top_k_per_group"),
    "moe.num_groups": ("moe.groups", "moe.top_k_per_group"),
    "moe.top_k": ("moe.top_k_per_group",),
    "moe.top_k_per_group": ("moe.top_k",),
    "moe.every": ("moe.layers",),
}


def load_config(
    source: str | Path | None = None, *, sets: Sequence[str] = (), overrides: Mapping[str, Any] | None = None
) -> Config:
    """Return the resolved configuration.

    Args:
        source: a recipe's name, a `.toml` file, or a run's `config.json`; None is the default recipe.
        sets: changes as `"train.steps=100"`; the value is read as TOML, or taken as text where it is not TOML.
        overrides: a tree of keys that goes over everything else; one layer with `sets`.

    Raises:
        ConfigError: every problem found, together.

    >>> load_config("lm_tiny", sets=["moe.preset=moge"]).moe.preset
    'moge'
    """
    tree: dict[str, Any] = {}
    for layer in (*_source_layers(source), _deep_merge(parse_sets(sets), overrides or {})):
        tree = merge(tree, layer)
    return Config.model_validate(_nulls(tree))


def merge(base: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `layer` over it; see `RETIRES` for the keys that go together."""
    kept = deepcopy(dict(base))
    for key, others in RETIRES.items():
        section, _, name = key.partition(".")
        if _section(layer, section).get(name) not in (None, "none", []):
            for other in others:
                _drop(kept, other)
    sources, below = (_section(tree, "data").get("sources") for tree in (layer, base))
    if isinstance(sources, Mapping) and not (isinstance(below, Mapping) and sources.keys() <= below.keys()):
        _drop(kept, "data.weights")  # shares belong to the names, wherever these lie
    if "preset" in _section(layer, "moe"):  # options are a preset's, so that none leaves none
        _drop(kept, "moe.options")
    return _deep_merge(kept, layer)


def _section(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = tree.get(name)
    return table if isinstance(table, Mapping) else {}


def _drop(tree: dict[str, Any], key: str) -> None:
    section, _, name = key.partition(".")
    if isinstance(table := tree.get(section), dict):
        table.pop(name, None)


def parse_sets(sets: Sequence[str]) -> dict[str, Any]:
    """Return the tree that `--set` arguments describe; they count as one layer.

    >>> parse_sets(["train.steps=100", "data.path=corpus/a.txt"])
    {'train': {'steps': 100}, 'data': {'path': 'corpus/a.txt'}}
    """
    tree: dict[str, Any] = {}
    for text in sets:
        try:
            keys, value = split_assignment(text)
        except ValueError:
            keys, value = [], None
        if value is None:
            raise ConfigError(f"--set {text}: must look like key=value, as in --set train.steps=100")
        branch: Any = _parse_value(value.strip())
        for key in reversed(keys):
            branch = {key: branch}
        tree = _deep_merge(tree, branch)
    return tree


def _parse_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if list(parsed) == ["value"] else text


def _deep_merge(base: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in layer.items():
        below = merged.get(key)
        merged[key] = _deep_merge(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


def _source_layers(source: str | Path | None) -> list[dict[str, Any]]:
    if source is None or Path(source).suffix not in {".toml", ".json"}:
        return _recipe_layers(str(source or DEFAULT_RECIPE))
    path = Path(source)
    tree = _read(path)
    if path.suffix == ".json":
        return [tree]  # a stored configuration is complete, so no recipe lies under it
    base = tree.pop("recipe", DEFAULT_RECIPE)
    if not isinstance(base, str):
        raise ConfigError(f"{path}: recipe = {base}: must be the name of a recipe")
    return [*_recipe_layers(base), {"name": re.sub(r"[^\w.-]+", "-", path.stem)}, tree]


def _recipe_layers(name: str) -> list[dict[str, Any]]:
    """Return a recipe and, below it, the one that it names in its first line."""
    tree = tomllib.loads(recipe_text(name))
    base = tree.pop("recipe", None)
    return [*(_recipe_layers(base) if base else []), {"name": name, **tree}]


def _read(path: Path) -> dict[str, Any]:
    """Read a TOML or JSON file that holds a table."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [entry.name for entry in path.parent.glob(f"*{path.suffix}")]
        raise ConfigError(f"no configuration file {path}{nearest(path.name, siblings)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    kind = path.suffix[1:].upper()
    try:
        tree = tomllib.loads(text) if kind == "TOML" else json.loads(text)
    except ValueError as error:  # both decoders raise a ValueError that names line and column
        raise ConfigError(f"{path}: not valid {kind}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold one table of keys")
    return tree


def _nulls(table: Mapping[str, Any], model: type[BaseModel] = Config) -> dict[str, Any]:
    """Read `"none"` as null wherever a key may be null, since TOML has no word for it."""
    clean = dict(table)
    for key, field in model.model_fields.items():
        value, kinds = clean.get(key), _kinds_of(field.annotation)
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if value == "none" and NoneType in get_args(field.annotation):
            clean[key] = None
        elif inner and isinstance(value, Mapping):
            clean[key] = _nulls(value, inner)
        elif inner and isinstance(value, list):
            clean[key] = [_nulls(item, inner) if isinstance(item, Mapping) else item for item in value]
    return clean


def _kinds_of(annotation: Any) -> Iterator[Any]:
    """Yield an annotation and what stands inside it: `list[A] | None` holds `A`."""
    yield annotation
    for inner in get_args(annotation):
        yield from _kinds_of(inner)
