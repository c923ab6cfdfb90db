"""One entry of a table in full: what it is, its paper, formula, options, state, and its place in a configuration.

What can only be known of the thing itself, such as its state, is read off a small one that is built for it.
"""

import inspect
import sys
from collections.abc import Hashable
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from himoe.cli.catalogue import KINDS
from himoe.cli.docstrings import first_line, own_doc, papers, sections
from himoe.cli.specimen import BESIDE, Facts, beside, facts_of
from himoe.config.key_tables import PLAIN_TYPES
from himoe.config.recipes import recipe_description, recipe_text
from himoe.config.toml import format_value
from himoe.registry import TABLES, fact, load

# Arguments that the configuration's other keys and the layer itself settle; the rest are an entry's options.
SETTLED = {"dim", "hidden_dim", "num_experts", "num_groups", "groups", "selection_groups", "top_k", "k",
           "backend", "context", "extra", "force", "logits", "scores"}  # fmt: skip
# Where an entry's options stand in a configuration.
OPTIONS = {"presets": "moe.options", "gates": "moe.gate_options", "selectors": "moe.selector_options"}
PLACE = {
    "balancers": '[[moe.balancers]]\nname = "{0}"',
    "gates": 'gate = "{0}"',
    "selectors": 'selector = "{0}"',
    "scores": 'score = "{0}"',
    "experts": 'experts = "{0}"',
    "presets": 'preset = "{0}"',
}
AMONG_OTHERS = 'pools = [{{ num_experts = 6, experts = "swiglu" }}, {{ num_experts = 2, experts = "{0}" }}]'
"""The place of experts that have no hidden layer: a layer of nothing else would compute next to nothing."""
BALANCED_BY = "switch"
"""What stands beside a gate, a selector or a score that is made for no other, so that the experts are used evenly."""
REQUIRED, TENSOR = "must be given", "tensor"


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
        papers: arXiv numbers that it names, its own first, or another source.
        opening: what its file opens with: formula, deviations.
        text: blocks of its own docstring.
        options: what a configuration can give it.
        facts: what only the thing itself can tell, see `Facts`.
        configuration: TOML that uses it, empty where no TOML can; of a recipe, the whole file.
    """

    table: str
    name: str
    description: str
    where: str
    papers: list[str] = field(default_factory=list)
    opening: str = ""
    text: list[str] = field(default_factory=list)
    options: list[Option] = field(default_factory=list)
    facts: Facts = field(default_factory=Facts)
    configuration: str = ""


def card(kind: str, name: str) -> Card:
    """Return an entry in full; raises `ConfigError` for a name that cannot be loaded."""
    assert kind in KINDS
    if kind == "recipes":
        where = f"himoe/recipes/{name}.toml"
        return Card(kind, name, recipe_description(name), where, configuration=recipe_text(name))
    entry = load(kind, name)
    doc, opening = own_doc(entry), inspect.getdoc(sys.modules[entry.__module__]) or ""
    text, arguments = sections(doc)
    text += [f"Options are {meaning}" for option, meaning in arguments.items() if option.startswith("**")]
    options = _options(entry)
    facts = facts_of(kind, name)
    return Card(
        kind,
        name,
        first_line(doc),
        TABLES[kind].get(name, name),
        papers(doc, opening),
        opening,
        text,
        options,
        facts,
        _configuration(kind, name, options, facts),
    )


def _options(entry: Any) -> list[Option]:
    """Return what a configuration can give an entry."""
    from himoe.build.calling import signature

    meanings = sections(own_doc(entry))[1]
    for name, meaning in list(meanings.items()):  # **options: as in `another` of the same file
        if name.startswith("**") and "`" in meaning:
            other = getattr(sys.modules[entry.__module__], meaning.split("`")[1], None)
            meanings = sections(inspect.getdoc(other) or "")[1] | meanings
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        Option(option.name, _kind(option.annotation), _default(option), meanings.get(option.name, ""))
        for option in signature(entry).parameters.values()
        if option.name not in SETTLED and option.kind not in variadic
    ]


def _kind(annotation: Any) -> str:
    """Return in words what kind of value an option takes, as far as it is plain.

    >>> _kind(int | None), _kind(Literal["a", "b"]), _kind(tuple[str, ...] | None)
    ('whole number or none', '"a" or "b"', 'list or none')
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(map(_kind, inner))
    if origin is Literal:
        return " or ".join(map(format_value, inner))
    if isinstance(annotation, Hashable) and annotation in PLAIN_TYPES:
        return PLAIN_TYPES[annotation]
    if getattr(annotation, "__module__", "").partition(".")[0] in ("torch", "jaxtyping"):
        return TENSOR
    return "any" if annotation is inspect.Parameter.empty or isinstance(annotation, str) else "list"


def _default(option: inspect.Parameter) -> str:
    if option.default is option.empty:
        return REQUIRED
    return "none" if option.default is None else format_value(option.default)


def _configuration(kind: str, name: str, options: list[Option], facts: Facts) -> str:
    """Return TOML that uses the entry, with its first option that has a value, or with all that must be given."""
    required = [option for option in options if option.default == REQUIRED]
    if any(option.kind == TENSOR for option in required):
        return ""
    keys = [f"{key} = {format_value(value)}" for key, value in beside(kind, name).items()]
    free = kind == "experts" and "hidden_dim" not in inspect.signature(load(kind, name)).parameters
    if free:
        keys += [f"{key} = {format_value(value)}" for key, value in BESIDE.items()]
    place = (AMONG_OTHERS if free else PLACE[kind]).format(name)
    if kind != "balancers":
        keys.append(place)
    if facts.causal is False:
        keys.append("allow_non_causal = true")
    section = "\n".join(["[moe]", *keys]) if keys else ""
    place = "\n\n".join(filter(None, [section, place])) if kind == "balancers" else section
    shown = [f"# {option.name} = …  # must be given" for option in required]
    shown += [f"{option.name} = {option.default}" for option in options if option.default not in ("none", REQUIRED)][:1]
    if shown and (kind in OPTIONS or kind == "balancers"):
        place += "".join([f"\n\n[{OPTIONS[kind]}]" if kind in OPTIONS else "", *(f"\n{line}" for line in shown)])
    alone = kind not in ("gates", "selectors", "scores") or facts.balances_load
    if alone and not free:
        return place
    balancer = fact(kind, name, "goes_with", {}).get("balancer", BALANCED_BY)
    return f'{place}\n\n[[moe.balancers]]\nname = "{balancer}"'
