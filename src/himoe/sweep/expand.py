"""From a spec to its runs: every combination, resolved to a configuration, checked, duplicates merged."""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from himoe.config import Config, load_config
from himoe.config.toml import format_value
from himoe.errors import ConfigError, HimoeError
from himoe.sweep.family import Member, kept_parameters, members, sizes
from himoe.sweep.identity import run_id
from himoe.sweep.spec import Spec, load_spec, one_line

LONGEST_WORD = 40


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        id: hash of the configuration; the run folder's name.
        config: the resolved configuration.
        varied: what the spec's axes and family say of this run, by key.
    """

    id: str
    config: Config
    varied: dict[str, Any]

    @property
    def name(self) -> str:
        """Return the varied keys in words."""
        return words(self.varied)


def words(varied: Mapping[str, Any]) -> str:
    """Return keys and values as text, each key by its last part where that is enough.

    >>> words({"moe.num_experts": 8, "moe.preset": "switch", "seed": 0})
    'num_experts=8 preset=switch seed=0'
    """
    last = [key.rpartition(".")[2] for key in varied]
    parts = []
    for key, short in zip(varied, last, strict=True):
        value = varied[key]
        text = value if isinstance(value, str) else format_value(value)
        text = text if len(text) <= LONGEST_WORD else f"{text[: LONGEST_WORD - 1]}…"
        parts.append(f"{short if last.count(short) == 1 else key}={text}")
    return " ".join(parts)


def expand(source: Spec | Mapping[str, Any] | str | Path) -> list[Run]:
    """Return the runs of a sweep, in the order of its axes, the last one fastest; runs that are the same stand once.

    Args:
        source: a `Spec`, its tree, a TOML file, or the name of a shipped sweep.

    Raises:
        ConfigError: in one line, naming the key, before anything has started; it says how many more runs cannot be.

    >>> runs = expand({"recipe": "lm_tiny", "axes": {"moe.preset": ["hi_moe", "moge"], "seed": [0, 1]}})
    >>> [run.name for run in runs][:2]
    ['preset=hi_moe seed=0', 'preset=hi_moe seed=1']
    """
    spec = load_spec(source)
    found: dict[str, Run] = {}
    kept: dict[str, int] = {}
    wrong: list[str] = []
    for varied, keys, member in _combinations(spec):
        try:
            run = _resolve(spec, varied, keys, member, kept)
        except HimoeError as error:
            wrong.append(f"{words(varied) or 'the run'}: {one_line(error)}")
            continue
        found.setdefault(run.id, run)
    if wrong:
        more = f" (and {len(wrong) - 1} more runs that cannot be)" if len(wrong) > 1 else ""
        raise ConfigError(f"{wrong[0]}{more}")
    return list(found.values())


def num_combinations(spec: Spec) -> int:
    """Return how many runs the spec asks for, the same ones counted again."""
    return sum(1 for _ in _combinations(spec))


def _combinations(spec: Spec) -> Iterator[tuple[dict[str, Any], dict[str, Any], Member | None]]:
    """Yield what a run is called by, its keys of the configuration, and its member of the family.

    The last axis moves fastest, the family faster still: seeds that stand first come one after the other for all
    the rest.
    """
    axes: list[list[list[tuple[str, Any]]]]
    axes = [[[(key, value)] for value in values] for key, values in spec.axes.items()]
    for one in spec.zip:
        axes.append([list(zip(one, values, strict=True)) for values in zip(*one.values(), strict=True)])
    sized: list[tuple[dict[str, Any], Member | None]]
    sized = [*members(spec.family)] if spec.family else [({}, None)]
    for chosen, (called, member) in itertools.product(itertools.product(*axes), sized):
        keys = dict(pair for group in chosen for pair in group)
        named = {key: value for key, value in keys.items() if key != "seed"} | called
        yield named | ({"seed": keys["seed"]} if "seed" in keys else {}), keys, member


def _resolve(
    spec: Spec, varied: dict[str, Any], keys: dict[str, Any], member: Member | None, kept: dict[str, int]
) -> Run:
    """Return the run; `kept` remembers what a family keeps, by all that is varied beside it."""
    tree: dict[str, Any] = {}
    if spec.data is not None:
        tree["data"] = {"path": spec.data} if isinstance(spec.data, str) else {"sources": spec.data}
    for key, value in (spec.set | keys).items():
        _put(tree, key.split("."), value)
    recipe = str(tree.pop("recipe", spec.recipe))
    config = load_config(recipe, overrides=tree)
    if spec.family is not None and member is not None:
        moe = sizes(spec.family, config, member)
        config = load_config(recipe, overrides=tree | {"moe": tree.get("moe", {}) | moe})
        number = kept_parameters(spec.family, config)
        beside = json.dumps(keys, sort_keys=True, default=str)
        if number != kept.setdefault(beside, number):
            raise ConfigError(
                f"[family] keep = {spec.family.keep!r}: {number} parameters without the router, where another member "
                f"has {kept[beside]}"
            )
    config = _with_absolute_paths(config)
    if recipe.endswith(".json") and "recipe" in varied:  # a stored configuration holds its name
        varied = varied | {"recipe": config.name}
    return Run(run_id(config), config, varied)


def _put(tree: dict[str, Any], parts: list[str], value: Any) -> None:
    for part in parts[:-1]:
        below = tree.setdefault(part, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{'.'.join(parts)} lies in {part}, which is given as a whole too")
        tree = below
    if isinstance(value, Mapping) and isinstance(tree.get(parts[-1]), dict):
        tree[parts[-1]] = {**tree[parts[-1]], **value}
    else:
        tree[parts[-1]] = value


def _with_absolute_paths(config: Config) -> Config:
    """Return the configuration for workers that stand elsewhere, and equal where the same text is named otherwise."""
    data, train = config.data, config.train
    changes: dict[str, Any] = {}
    if data.path is not None:
        changes["path"] = _absolute(data.path)
    if data.sources is not None:
        changes["sources"] = {name: _absolute(path) for name, path in data.sources.items()}
    if data.tokenizer not in ("bpe", "byte"):
        changes["tokenizer"] = _absolute(data.tokenizer)
    train = train.model_copy(update={"init_from": _absolute(train.init_from)}) if train.init_from else train
    return config.model_copy(update={"data": data.model_copy(update=changes), "train": train})


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())
