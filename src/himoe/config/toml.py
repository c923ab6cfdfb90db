"""Writes a configuration as TOML, and reads a single `key = value` of it; the standard library only reads documents.

TOML has no null, so a key that is switched off is written, and read, as the text `"none"`.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from typing import Any

# One part of a dotted key, in quotes or without; more is allowed without them than in a document.
PART = re.compile(r"""\s*(?:("(?:[^"\\]|\\.)+"|'[^']+')|([^\s."'=][^.=]*?))\s*(?=[.=]|$)""")


def format_value(value: Any) -> str:
    """Return one value in TOML's notation.

    >>> format_value({"name": "z_loss", "weight": 0.001})
    '{ name = "z_loss", weight = 0.001 }'
    """
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{format_key(key)} = {format_value(item)}" for key, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(format_value, value))}]"
    return repr(value) if isinstance(value, int | float) else str(value)


def format_key(key: object) -> str:
    """Return a key bare where TOML allows it, else quoted."""
    text = str(key)
    bare = text.isascii() and text.replace("-", "").replace("_", "").isalnum()
    return text if bare else json.dumps(text, ensure_ascii=False)


def split_assignment(text: str) -> tuple[list[str], str | None]:
    """Return the parts of a dotted key and what stands behind its `=`, None where there is none.

    Raises ValueError where there is no key.

    >>> split_assignment('data.weights."example.com" = 0.5')
    (['data', 'weights', 'example.com'], ' 0.5')
    """
    parts, end = [], -1
    while end < 0 or text[end : end + 1] == ".":
        part = PART.match(text, end + 1)
        if part is None:
            raise ValueError(f"{text}: not a key")
        parts.append(tomllib.loads(f"part = {part[1]}")["part"] if part[1] else part[2])
        end = part.end()
    return parts, text[end + 1 :] if end < len(text) else None


def format_document(tree: Mapping[str, Any]) -> str:
    """Return a whole document: plain keys first, then one `[section]` for each table at the top.

    >>> print(format_document({"seed": 0, "train": {"steps": 20}}))
    seed = 0
    <BLANKLINE>
    [train]
    steps = 20
    """
    plain = {key: value for key, value in tree.items() if not isinstance(value, Mapping)}
    blocks = ["\n".join(_lines(plain))] if plain else []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            blocks.append("\n".join([f"[{format_key(key)}]", *_lines(value)]))
    return "\n\n".join(blocks)


def _lines(table: Mapping[str, Any]) -> list[str]:
    return [f"{format_key(key)} = {format_value(value)}" for key, value in table.items()]
