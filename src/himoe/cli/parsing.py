"""Turns arguments into a verb's dataclass with tyro, and tyro's error boxes into one line."""

import contextlib
import inspect
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

import tyro

from himoe.config.problems import OTHER_NAMES
from himoe.config.schema import Config, key_tree
from himoe.config.toml import format_key, split_assignment
from himoe.errors import ConfigError, nearest

NAMED_BY_USERS = (["data", "sources"], ["data", "weights"])  # tables whose keys are domains, and stay as they are typed


def option(metavar: str | None = None, name: str | None = None) -> Any:
    """Describe an argument; its help text is the string below the field, which says what leaving it out means."""
    return tyro.conf.arg(metavar=metavar, name=name, help_behavior_hint="")


@dataclass(kw_only=True)
class Verb:
    """Base of the verbs: the fields are the arguments, the docstring is the help."""

    as_json: Annotated[bool, option(name="json")] = False
    """Print one JSON document on stdout; progress goes to stderr."""
    debug: Annotated[bool, option()] = False
    """Show a traceback with an error."""

    def run(self, command: list[str]) -> int:
        """Do the work and return the exit status; `command` is what was typed."""
        raise NotImplementedError


def parse(verb: type[Verb], prog: str, arguments: Sequence[str]) -> Verb | None:
    """Return the verb filled in, or None after its help was printed.

    Raises:
        ConfigError: an argument that is unknown, missing or of the wrong kind.
    """
    complaint = io.StringIO()
    if any(_option_name(field.name, field.type) == "set" for field in fields(verb)):
        arguments = keys_as_sets(arguments)
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
        raise ConfigError(f"{_unexpected(verb, unknown)} (see {prog} --help)")
    return filled


def keys_as_sets(arguments: Sequence[str]) -> list[str]:
    """Write every option that is called like a key of the configuration as a `--set`.

    >>> keys_as_sets(["lm_tiny", "--train.batch-size", "8", "--data.cross-documents"])
    ['lm_tiny', '--set', 'train.batch_size=8', '--set', 'data.cross_documents=true']
    """
    words, rewritten = list(arguments), []
    while words:
        word = words.pop(0)
        key, value = _key_of(word)
        if key is None:
            rewritten.append(word)
            continue
        if value is None:
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
        rewritten += ["--set", f"{key}={value}"]
    return rewritten


def _key_of(option_name: str) -> tuple[str | None, str | None]:
    """Return the key of the configuration that an option is, and the value given with it; None where there is none.

    >>> _key_of("--data.weights.my-web=0.5"), _key_of("--data.cross-documents"), _key_of("--dry-run")
    (('data.weights.my-web', '0.5'), ('data.cross_documents', None), (None, None))
    """
    try:
        parts, value = split_assignment(option_name.removeprefix("--"))
    except ValueError:
        return None, None
    if not option_name.startswith("--") or len(parts) < 2 or parts[0] not in key_tree(Config):
        return None, None
    ours = 2 if parts[:2] in NAMED_BY_USERS else len(parts)
    parts[:ours] = [part.replace("-", "_") for part in parts[:ours]]
    return ".".join(map(format_key, parts)), value


def _unexpected(verb: type[Verb], unknown: Sequence[str]) -> str:
    argument, *rest = unknown
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r}"
    name, equals, value = argument.partition("=")
    known = ["help", *(_option_name(field.name, field.type) for field in fields(verb))]
    hint = nearest(name.lstrip("-"), known).replace("'", "'--", 1)  # compared without the dashes, always alike
    if "set" in known and (key := _key_called(name)):
        value = value if equals else next((word for word in rest[:1] if not word.startswith("-")), "VALUE")
        hint = f"; did you mean --set {key}={value}?"
    return f"unknown option {argument!r}{hint}"


def _key_called(option_name: str) -> str | None:
    """Return the one key of the configuration that an option is called like, here or in another project.

    >>> _key_called("--steps"), _key_called("--max-steps"), _key_called("--stpes")
    ('train.steps', 'train.steps', None)
    """
    words = option_name.lstrip("-").replace("-", "_")
    tree = key_tree(Config)
    keys = [f"{section}.{key}".lstrip(".") for section, names in tree.items() for key in names if key not in tree]
    found = [key for key in keys if words in (key, key.rpartition(".")[2])]
    return found[0] if len(found) == 1 else OTHER_NAMES.get(words)


def _option_name(field: str, annotation: Any) -> str:
    """Return an option as it is typed: `--dry-run` for the field `dry_run`, unless it was given another name."""
    named = [getattr(part, "name", None) for part in getattr(annotation, "__metadata__", ())]
    return next(filter(None, named), field.replace("_", "-"))


def _first_paragraph(box: str) -> str:
    """Return the message inside one of tyro's boxes, which a rule separates from its advice.

    In terminals that know ASCII only, a rule of hyphens stands above the message too.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    body = [line.strip(" │|") for line in plain.splitlines()[1:]]
    message: list[str] = []
    for line in body:
        if not line.startswith(("─", "╰", "---", "+--")):
            message.append(line)
        elif message:
            break
    text = " ".join(message).strip().rstrip(".")
    if missing := re.match(r"Missing value for argument '(\S+)'", text):
        return f"{missing[1]} needs a value"
    if wrong := re.match(r"Error parsing (\S+):.*(base 10|to float): '?(.*?)'?$", text):
        name, kind, given = wrong.groups()
        return f"{name} is {given!r}; it must be a {'whole number' if kind == 'base 10' else 'number'}"
    return text or "these arguments cannot be read"
