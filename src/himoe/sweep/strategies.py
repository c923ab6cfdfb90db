"""Strategies by their names, each as a whole configuration over one recipe: what `himoe compare` trains."""

from collections.abc import Mapping, Sequence
from typing import Any

from himoe.config import Config, load_config
from himoe.config.loading import merge
from himoe.config.recipes import recipe_names
from himoe.errors import ConfigError, HimoeError, nearest
from himoe.plan import flops, shape_of
from himoe.registry import BALANCERS, PRESETS, fact
from himoe.sweep.identity import run_id
from himoe.sweep.spec import one_line

DENSE = "dense"
ALIKE = 0.03
"""Strategies whose FLOPs a token differ by more than this share are not at equal cost; routers alone differ."""


def strategies(names: Sequence[str], recipe: str | None = None, sets: Sequence[str] = ()) -> dict[str, Config]:
    """Return the configuration of every strategy, by its name, in the order given.

    A name is that of a preset, with its default options; of a balancer, beside the plain top-k of a softmax or what it
    is made for; `dense`, one network of the width that a token's experts have together; or of a recipe or TOML file,
    as it is. All but the last lie over `recipe`: its data, model, training, experts, capacity.

    Args:
        names: of the strategies; a preset comes before a balancer of its name.
        recipe: what they lie over; None is the default recipe.
        sets: changes for all, as `"train.steps=100"`; strategies go over them.

    Raises:
        ConfigError: fewer than two, an unknown name, two names for one thing, or a configuration that cannot be.

    >>> found = strategies(["hi_moe", "switch", "dense"], "lm_tiny")
    >>> found["switch"].moe.preset, found["dense"].moe_layer_indices, found["dense"].model.ffn_dim
    ('switch', [], 128)
    """
    if len(set(names)) < 2:
        raise ConfigError("--strategies: name two or more, as in hi_moe,switch,dense")
    base = load_config(recipe, sets=sets)
    found: dict[str, Config] = {}
    ids: dict[str, str] = {}
    for name in dict.fromkeys(names):
        try:
            config = _strategy(name, base, sets)
        except HimoeError as error:
            raise ConfigError(f"{name}: {one_line(error)}") from None
        same = ids.setdefault(run_id(config), config.name)
        if config.name in found:
            raise ConfigError(f"--strategies {name}: another one is called {config.name} too; rename the file")
        if same != config.name:
            raise ConfigError(f"--strategies {name}: the same configuration as {same}; leave one of the two out")
        found[config.name] = config
    return found


def _strategy(name: str, base: Config, sets: Sequence[str]) -> Config:
    if name.endswith(".toml") or (name in recipe_names() and name not in PRESETS):
        return load_config(name, sets=sets)
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
    """Return the tree without experts, layers as wide as the experts of a token."""
    with_experts = base.moe_layer_indices
    if not with_experts:
        raise ConfigError("the recipe is dense already; name one with experts")
    if base.moe.pools is not None:
        raise ConfigError("experts of several sizes have no one width; compare a recipe of your own with model.ffn_dim")
    width = base.moe.top_k * base.moe.expert_dim + base.moe.shared_dim
    if len(with_experts) < base.model.num_layers and base.model.ffn_dim != width:
        raise ConfigError(
            f"the recipe has dense layers of width {base.model.ffn_dim} beside experts of {width} for a token; set "
            f"model.ffn_dim={width}, or compare a recipe of your own"
        )
    return tree | {"model": tree["model"] | {"ffn_dim": width}, "moe": tree["moe"] | {"every": 0, "layers": None}}


def training_flops(found: Mapping[str, Config]) -> dict[str, float | None]:
    """Return the training FLOPs a token of every strategy, as `himoe.plan` counts them; None where it cannot."""
    costs: dict[str, float | None] = {}
    for name, config in found.items():
        try:
            costs[name] = flops(shape_of(config), config.train.seq_len, config.train.recompute).total
        except HimoeError:
            costs[name] = None
    return costs


def unequal(costs: Mapping[str, float | None], against: str) -> dict[str, float]:
    """Return the strategies that cost more or less than one of them, and by what share, where that is no trifle."""
    base = costs[against]
    if not base:
        return {}
    shares = {name: cost / base - 1 for name, cost in costs.items() if cost}
    return {name: share for name, share in shares.items() if abs(share) > ALIKE}


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
