"""Turns arguments into a verb's dataclass with tyro, and tyro's error boxes into one line."""

import contextlib
import inspect
import io
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Protocol

import tyro

from himoe.errors import ConfigError, nearest


class Verb(Protocol):
    """A dataclass whose fields are the arguments, its docstring the help."""

    def run(self, command: list[str]) -> int:
        """Do the work and return the exit status; `command` is what was typed."""
        ...


def option(metavar: str | None = None, name: str | None = None) -> Any:
    """Describe an argument; its help text is the string below the field, which says what leaving it out means."""
    return tyro.conf.arg(metavar=metavar, name=name, help_behavior_hint="")


def parse(verb: type, prog: str, arguments: Sequence[str]) -> Any:
    """Return the verb filled in, or None after its help was printed.

    Raises:
        ConfigError: an argument that is unknown, missing or of the wrong kind.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            filled, unknown = tyro.cli(
                verb,
                prog=prog,
                description=inspect.getdoc(verb),
                args=list(arguments),
                config=(tyro.conf.FlagCreatePairsOff,),
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if stop.code:
            raise ConfigError(f"{_first_paragraph(complaint.getvalue())} (see {prog} --help)") from None
        return None
    if unknown:
        raise ConfigError(f"{_unexpected(verb, unknown[0])} (see {prog} --help)")
    return filled


def _unexpected(verb: type, argument: str) -> str:
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r}"
    known = ["--help", *(f"--{_option_name(field.name, field.type)}" for field in fields(verb))]
    return f"unknown option {argument!r}{nearest(argument.partition('=')[0], known)}"


def _option_name(field: str, annotation: Any) -> str:
    """Return an option as it is typed: `--dry-run` for the field `dry_run`, unless it was given another name."""
    named = [getattr(part, "name", None) for part in getattr(annotation, "__metadata__", ())]
    return next(filter(None, named), field.replace("_", "-"))


def _first_paragraph(box: str) -> str:
    """Return the message inside one of tyro's boxes, which a rule separates from its advice."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    body = [line.strip(" │|") for line in plain.splitlines()[1:]]
    message: list[str] = []
    for line in body:
        if line.startswith(("─", "╰")):
            break
        message.append(line)
    return " ".join(message).strip().rstrip(".") or "these arguments cannot be read"
