"""Strategies by their names, each as a whole configuration over one recipe: what `himoe compare` trains."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from himoe.config import Config, load_config
from himoe.config.loading import RETIRES, merge, parse_sets
from himoe.config.recipes import recipe_names
from himoe.errors import ConfigError, HimoeError, nearest
from himoe.plan import flops, shape_of
from himoe.registry import BALANCERS, PRESETS, fact
from himoe.sweep.identity import run_id
from himoe.sweep.spec import one_line

DENSE = "dense"
ALIKE = 0.03
"""Strategies whose FLOPs a token differ by more than this share are not at equal cost; routers alone differ."""
OF_STRATEGIES = ("moe.preset", *RETIRES["moe.preset"], "seed", "name")
"""Keys that a strategy, or the comparison, gives a value."""


def strategies(
    names: Sequence[str], recipe: str | None = None, sets: Sequence[str] = (), data: Path | None = None
) -> dict[str, Config]:
    """Return the configuration of every strategy, by its name, in the order given.

    A name is that of a preset, with its default options; of a balancer, beside the plain top-k of a softmax or what it
    is made for; `dense`, one network of the width that a token's experts have together; or of a recipe or TOML file.
    All but the last lie over `recipe`: its data, model, training, experts, capacity.

    Args:
        names: of the strategies; a preset comes before a balancer of its name.
        recipe: what they lie over; None is the default recipe.
        sets: changes over the recipe, and over recipes and files among the names, as `"train.steps=100"`; none of a
            key that strategies give a value.
        data: what to learn, in place of what the recipes say.

    Raises:
        ConfigError: fewer than two, an unknown name, two names for one thing, or a configuration that cannot be.

    >>> found = strategies(["hi_moe", "switch", "dense"], "lm_tiny")
    >>> found["switch"].moe.preset, found["dense"].moe_layer_indices, found["dense"].model.ffn_dim
    ('switch', [], 128)
    """
    if len(set(names)) < 2:
        raise ConfigError("--strategies: name two or more, as in hi_moe,switch,dense")
    _check_sets(sets)
    over = {"data": {"path": str(data), "sources": None}} if data else {}
    base = load_config(recipe, sets=sets, overrides=over)
    found: dict[str, Config] = {}
    ids: dict[str, str] = {}
    for name in dict.fromkeys(names):
        try:
            if name.endswith(".toml") or (name in recipe_names() and name not in PRESETS):
                config = load_config(name, sets=sets, overrides=over)
            else:
                config = _strategy(name, base)
        except HimoeError as error:
            raise ConfigError(f"{name}: {one_line(error)}") from None
        if config.name in found:
            raise ConfigError(f"--strategies {name}: another one is called {config.name} too; rename the file")
        same = ids.setdefault(run_id(with_run(config, seed=0, learning_rate=1.0)), config.name)
        if same != config.name:
            raise ConfigError(f"--strategies {name}: the same configuration as {same}; leave one of the two out")
        found[config.name] = config
    return found


def with_run(config: Config, *, seed: int, learning_rate: float) -> Config:
    """Return the configuration with what a comparison decides of a run."""
    train = config.train.model_copy(update={"learning_rate": learning_rate})
    return config.model_copy(update={"seed": seed, "train": train})


def _check_sets(sets: Sequence[str]) -> None:
    tree = parse_sets(sets)
    given = [f"{section}.{key}" for section, table in tree.items() if isinstance(table, dict) for key in table]
    for key in [*tree, *given]:
        if key in OF_STRATEGIES:
            raise ConfigError(
                f"--set {key}: the strategies, or the comparison, say this; write it into a TOML file of your own and "
                "name that among the strategies"
            )


def _strategy(name: str, base: Config) -> Config:
    tree = base.model_dump(mode="json")
    if name == DENSE:
        return Config.model_validate({**_dense(base, tree), "name": name})
    if name in PRESETS:
        layer: dict[str, Any] = {"preset": name}
    elif name in BALANCERS:
        made_for = {key: value for key, value in fact("balancers", name, "goes_with", {}).items() if key != "balancer"}
        # the gate is named so that one of the recipe's own does not stay
        layer = {"selector": "top_k", "gate": "linear", **made_for, "balancers": [{"name": name}]}
    else:
        known = [*PRESETS, *BALANCERS, DENSE, *recipe_names()]
        raise ConfigError(
            f"no such strategy{nearest(name, known)}; name a preset, a balancer, {DENSE}, a recipe or a TOML file"
        )
    return Config.model_validate(merge(tree, {"name": name, "moe": layer}))


def _dense(base: Config, tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree without experts, layers as wide as the experts of a token and of their kind."""
    with_experts, moe = base.moe_layer_indices, base.moe
    if not with_experts:
        raise ConfigError("the recipe is dense already; name one with experts")
    if moe.pools is not None:
        raise ConfigError("experts of several sizes have no one width; compare a recipe of your own with model.ffn_dim")
    layer = {"ffn_dim": moe.top_k * moe.expert_dim + moe.shared_dim, "ffn": moe.experts}
    beside = {key: getattr(base.model, key) for key in layer}
    if len(with_experts) < base.model.num_layers and beside != layer:
        raise ConfigError(
            f"the recipe has dense layers of width {beside['ffn_dim']} ({beside['ffn']}) beside experts of "
            f"{layer['ffn_dim']} ({layer['ffn']}) for a token; make them equal, or compare a recipe of your own"
        )
    return tree | {"model": tree["model"] | layer, "moe": tree["moe"] | {"every": 0, "layers": None}}


SHARED = ("data", "train.steps", "train.batch_size", "train.seq_len")
"""What strategies must have in common for their losses, seed by seed, to compare."""


def check_is_one(found: Mapping[str, Config]) -> None:
    """Refuse strategies that would learn from unlike text, or from unlike amounts of it."""
    (first, base), *others = found.items()
    for name, config in others:
        for key in SHARED:
            ours, theirs = (_at(one, key) for one in (config, base))
            if ours != theirs:
                told = "" if key == "data" else f" ({ours} and {theirs})"
                raise ConfigError(f"{name} and {first} differ in {key}{told}, so their losses do not compare")


def _at(config: Config, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


def cost_notes(found: Mapping[str, Config], against: str) -> list[str]:
    """Say which strategies are not at the training cost of one of them, as `himoe.plan` counts FLOPs a token."""
    costs: dict[str, float | None] = {}
    for name, config in found.items():
        try:
            costs[name] = flops(shape_of(config), config.train.seq_len, config.train.recompute).total
        except HimoeError:  # experts of somebody's own, or a tokenizer whose file alone knows its size
            costs[name] = None
    base, notes = costs[against], []
    for name, cost in costs.items():
        if cost is None or base is None:
            notes.append(f"the FLOPs of {name} cannot be counted: whether it is at equal cost is not known")
        elif abs(share := cost / base - 1) > ALIKE:
            notes.append(f"{name} costs {share:+.0%} FLOPs a token against {against}: not at equal cost")
    return notes
