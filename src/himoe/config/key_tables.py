"""Prints the tables of `docs/configuration.md`: `python -m himoe.config.key_tables`."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types as bounds
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from himoe.config.kinds import LARGEST
from himoe.config.schema import Config
from himoe.config.toml import format_value

PLAIN_TYPES = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "none"}
HEAD = "| Key | Default | Allowed | Meaning |\n|---|---|---|---|"


def section_tables() -> dict[str, str]:
    """Return a Markdown table for each section, the keys of the top under the empty name."""
    tables: dict[str, str] = {}
    top = {}
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            tables[name] = _table(section.model_fields, f"{name}.")
        else:
            top[name] = field
    return {"": _table(top, ""), **tables}


def _table(fields: dict[str, FieldInfo], prefix: str) -> str:
    rows = [
        f"| `{prefix}{name}` | {_default(field)} | {_allowed(field)} | {field.description} |"
        for name, field in fields.items()
    ]
    return "\n".join([HEAD, *rows])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "from the recipe"
    return f"`{format_value(field.get_default(call_default_factory=True))}`"


def _allowed(field: FieldInfo) -> str:
    limits = [_limit(item) for item in (*field.metadata, *_inner_metadata(field.annotation))]
    return ", ".join([_type_name(field.annotation), *dict.fromkeys(filter(None, limits))])


def _inner_metadata(annotation: Any) -> Iterator[Any]:
    """Yield what is said of a type inside another, such as the bounds of a number that may be none."""
    if get_origin(annotation) is Annotated:
        for item in annotation.__metadata__:
            yield from item.metadata if isinstance(item, FieldInfo) else [item]
    for inner in get_args(annotation):
        yield from _inner_metadata(inner)


def _limit(item: Any) -> str:
    for kind, sign in ((bounds.Ge, "≥"), (bounds.Gt, ">"), (bounds.Le, "≤"), (bounds.Lt, "<")):
        if isinstance(item, kind):
            limit = getattr(item, kind.__name__.lower())
            if limit != LARGEST:  # that one holds for every count; the page says it once
                return f"{sign} {'2⁶³' if limit == 2**63 else limit}"
    return ""


def _type_name(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation in PLAIN_TYPES:
        name = PLAIN_TYPES[annotation]
    elif origin is Literal:
        name = " or ".join(f"`{choice}`" for choice in inner)
    elif origin is list:
        name = f"list of {_plural(inner[0])}"
    elif origin is tuple:
        name = f"list of {len(inner)} {_plural(inner[0])}"
    elif origin is dict and _type_name(inner[1]) == "number":
        name = "table of numbers"
    elif origin is dict or isinstance(annotation, type):
        name = "table"
    elif origin is Annotated:
        name = _type_name(inner[0])
    else:
        name = " or ".join(map(_type_name, inner))
    return name


def _plural(annotation: Any) -> str:
    name = _type_name(annotation)
    if get_origin(annotation) is Literal:
        return name.replace(" or ", ", ")
    return name.replace("list of", "lists of") if name.startswith("list") else f"{name}s"


if __name__ == "__main__":
    for section, table in section_tables().items():
        print(f"## {f'`[{section}]`' if section else 'The run'}\n\n{table}\n")
