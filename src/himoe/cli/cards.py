"""One entry of a table in full: what it is, its paper, formula, options, state, and its place in a configuration.

What can only be known of the thing itself, such as its state, is read off a small one that is built for it.
"""

import inspect
import sys
import warnings
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from himoe.cli.catalogue import KINDS
from himoe.cli.docstrings import first_line, papers, sections
from himoe.config.key_tables import PLAIN_TYPES
from himoe.config.recipes import recipe_description, recipe_text
from himoe.config.toml import format_value
from himoe.errors import HimoeError, HimoeWarning
from himoe.registry import TABLES, load

# Arguments that the configuration's other keys and the layer itself settle; the rest are an entry's options.
SETTLED = {"dim", "hidden_dim", "num_experts", "num_groups", "groups", "top_k", "k",
           "backend", "context", "extra", "force", "logits", "scores"}  # fmt: skip
# Where an entry's options stand in a configuration.
OPTIONS = {"presets": "moe.options", "gates": "moe.gate_options", "selectors": "moe.selector_options"}
PLACE = {
    "balancers": '[[moe.balancers]]\nname = "{0}"',
    "gates": '[moe]\nselector = "top_k"\ngate = "{0}"',
    "selectors": '[moe]\nselector = "{0}"',
    "scores": '[moe]\nselector = "top_k"\nscore = "{0}"',
    "experts": '[moe]\nexperts = "{0}"',
    "presets": '[moe]\npreset = "{0}"',
}
# Sizes of the small layer, by which the letters of a shape are known again.
DIM = 10
SIZES = {"num_experts": 12, "num_groups": 3, "top_k": 3, "expert_dim": 14, "force": True}
LETTERS = {12: "E", 10: "D", 14: "F", 28: "2F", 3: "G"}
SPELLED_OUT = '[[moe.balancers]]\nname = "switch"'
"""What stands beside a gate, a selector or a score, so that the experts are used evenly."""


@dataclass(frozen=True)
class Option:
    """One option: its name, kind of value, default as it is written in a configuration, and meaning."""

    name: str
    kind: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Card:
    """An entry in full.

    Attributes:
        table: the table that it stands in.
        name: its name there.
        description: what it is, in a line.
        where: `"module:Name"`, or a recipe's file.
        papers: arXiv numbers that it names, its own first.
        opening: what its file opens with: formula, deviations.
        text: blocks of its own docstring.
        options: what a configuration can give it.
        state: what is saved with a model and moves without gradients, by name, with shape and dtype.
        parameters: what is learned, likewise.
        balances_load: whether it drives the experts towards equal load; None where that is not its business.
        causal: whether it leaves earlier tokens alone; None where it could not be built by itself.
        made_of: of a preset, the entries that it puts together, by table.
        configuration: TOML that uses it; of a recipe, the whole file.
    """

    table: str
    name: str
    description: str
    where: str
    papers: list[str] = field(default_factory=list)
    opening: str = ""
    text: list[str] = field(default_factory=list)
    options: list[Option] = field(default_factory=list)
    state: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    balances_load: bool | None = None
    causal: bool | None = None
    made_of: dict[str, list[str]] = field(default_factory=dict)
    configuration: str = ""


def card(kind: str, name: str) -> Card:
    """Return an entry in full; raises `ConfigError` for a name that cannot be loaded."""
    assert kind in KINDS
    if kind == "recipes":
        where = f"himoe/recipes/{name}.toml"
        return Card(kind, name, recipe_description(name), where, configuration=recipe_text(name))
    entry = load(kind, name)
    doc, opening = inspect.getdoc(entry) or "", inspect.getdoc(sys.modules[entry.__module__]) or ""
    text, arguments = sections(doc)
    text += [f"Options are {meaning}" for option, meaning in arguments.items() if option.startswith("**")]
    options = _options(entry)
    facts = _facts(kind, name)
    return Card(
        kind,
        name,
        first_line(doc),
        TABLES[kind].get(name, name),
        papers(doc, opening),
        opening,
        text,
        options,
        **facts,
        configuration=_configuration(kind, name, options, facts.get("causal")),
    )


def _facts(kind: str, name: str) -> dict[str, Any]:
    """Return what only the thing itself can tell, read off a small layer that has it."""
    from torch import nn

    from himoe.balance import Balancer
    from himoe.build import build_moe
    from himoe.config import load_config
    from himoe.nn import non_causal_parts

    key = kind.removesuffix("s") if kind != "experts" else kind
    part = {"balancers": [{"name": name}]} if kind == "balancers" else {key: name}
    moe = (SIZES if kind in ("presets", "experts") else {**SIZES, "selector": "top_k"}) | part
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HimoeWarning)
        try:
            layer = build_moe(load_config("lm_tiny", overrides={"moe": moe}).moe, DIM)
        except HimoeError:  # a reader's own part may need options
            return {}
    found = _part(kind, layer)
    balancing = [m for m in found.modules() if isinstance(m, Balancer)] if isinstance(found, nn.Module) else [found]
    state, parameters = ({}, {})
    if isinstance(found, nn.Module):
        state = {name: _shape(value) for name, value in found.named_buffers()}
        parameters = {name: _shape(value) for name, value in found.named_parameters()}
    concerned = kind in ("balancers", "selectors", "presets")
    return {
        "state": state,
        "parameters": parameters,
        "balances_load": any(getattr(p, "balances_load", False) for p in balancing) if concerned else None,
        "causal": not non_causal_parts(layer),
        "made_of": _composition(found) if kind == "presets" else {},
    }


def _part(kind: str, layer: Any) -> Any:
    """Return that of a layer which comes from a table: a module, or a function without its options."""
    router = layer.router
    part = {
        "balancers": lambda: router.balancer.parts[0],
        "gates": lambda: router.gate,
        "selectors": lambda: router.selector,
        "scores": lambda: router.score,
        "experts": lambda: layer.experts,
        "presets": lambda: router,
    }[kind]()
    return getattr(part, "func", part)


def _composition(router: Any) -> dict[str, list[str]]:
    """Return the names in their tables of what a preset puts together, or those of their classes."""
    from himoe.balance import Balancer, Chain

    balancers = [m for m in router.balancer.modules() if isinstance(m, Balancer) and not isinstance(m, Chain)]
    parts = {"gates": [router.gate], "scores": [router.score], "selectors": [router.selector], "balancers": balancers}
    return {table: [_name(table, part) for part in found] for table, found in parts.items()}


def _name(table: str, part: Any) -> str:
    thing = getattr(part, "func", part)
    made_by = thing if inspect.isfunction(thing) else type(thing)
    own = f"{made_by.__module__}:{made_by.__name__}"
    return next((name for name in TABLES[table] if load(table, name) is made_by), own)


def _shape(value: Any) -> str:
    """Return a shape in the project's letters and the dtype, as in `(E, D) float32`."""
    sizes = ", ".join(LETTERS.get(size, str(size)) for size in value.shape)
    return f"({sizes}{',' * (value.ndim == 1)}) {str(value.dtype).removeprefix('torch.')}"


def _options(entry: Any) -> list[Option]:
    """Return what a configuration can give an entry."""
    meanings = sections(inspect.getdoc(entry) or "")[1]
    for name, meaning in list(meanings.items()):  # **options: as in `another` of the same file
        if name.startswith("**") and "`" in meaning:
            other = getattr(sys.modules[entry.__module__], meaning.split("`")[1], None)
            meanings = sections(inspect.getdoc(other) or "")[1] | meanings
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        Option(option.name, _kind(option.annotation), _default(option), meanings.get(option.name, ""))
        for option in inspect.signature(entry).parameters.values()
        if option.name not in SETTLED and option.kind not in variadic
    ]


def _kind(annotation: Any) -> str:
    """Return in words what kind of value an option takes, as far as it is plain.

    >>> _kind(int | None), _kind(Literal["a", "b"]), _kind(tuple[str, ...] | None)
    ('whole number or none', '"a" or "b"', 'list or none')
    """
    if isinstance(annotation, UnionType):
        return " or ".join(_kind(part) for part in get_args(annotation))
    if get_origin(annotation) is Literal:
        return " or ".join(map(format_value, get_args(annotation)))
    if annotation in PLAIN_TYPES or annotation is NoneType:
        return PLAIN_TYPES[annotation]
    return "any" if annotation is inspect.Parameter.empty else "list"


def _default(option: inspect.Parameter) -> str:
    if option.default is option.empty:
        return "must be given"
    return "none" if option.default is None else format_value(option.default)


def _configuration(kind: str, name: str, options: list[Option], causal: bool | None) -> str:
    """Return TOML that uses the entry, with its first option that has a value."""
    place = PLACE[kind].format(name)
    given = next((f"{o.name} = {o.default}" for o in options if o.default not in ("none", "must be given")), "")
    if causal is False and kind != "balancers":
        place += "\nallow_non_causal = true"
    if given:
        place += f"\n\n[{OPTIONS[kind]}]\n{given}" if kind in OPTIONS else f"\n{given}" if kind == "balancers" else ""
    if causal is False and kind == "balancers":
        place = f"[moe]\nallow_non_causal = true\n\n{place}"
    return f"{place}\n\n{SPELLED_OUT}" if kind in ("gates", "selectors", "scores") else place
