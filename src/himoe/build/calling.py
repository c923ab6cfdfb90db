"""Calling what a name in the configuration stands for: every option is checked against its signature first."""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from types import NoneType, UnionType
from typing import Any, get_args

import torch
from torch import nn

from himoe.errors import ConfigError, nearest

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes"}
LONGEST_REASON = 200
ONLY_PYTHON = "is a tensor, which only Python can give, by functools.partial"


def parameters_of(function: Any, where: str) -> Mapping[str, inspect.Parameter]:
    """Return the parameters by name, or raise `ConfigError` for what has none."""
    try:
        return signature(function).parameters
    except (TypeError, ValueError) as error:  # it cannot be called, or is written in C and names no parameters
        raise ConfigError(f"{where}: must be a function or class whose parameters have names") from error


def signature(function: Any) -> inspect.Signature:
    """Return the signature, postponed annotations as what they stand for, or as text where they cannot be read."""
    try:
        return inspect.signature(function, eval_str=True)
    except Exception:  # an annotation may name what is imported for type checkers only
        return inspect.signature(function)


def call(function: Callable[..., Any], where: str, options: dict[str, Any], given: dict[str, Any]) -> Any:
    """Call `function` with what the layer gives and the user's options, after checking their names and kinds."""
    check_options(function, where, options, given)
    return construct(function, where, **given, **options)


def bind(function: Callable[..., Any], where: str, options: dict[str, Any], given: dict[str, Any]) -> Any:
    """Return `function` with what the layer gives and the user's options bound; its first two arguments stay open.

    Raises:
        ConfigError: options that do not fit, or a tensor that must be given and is not.
    """
    parameters = parameters_of(function, where)
    settled = dict.fromkeys([*parameters][:2]) | given
    check_options(function, where, options, settled)
    for name, parameter in parameters.items():
        missing = parameter.default is parameter.empty and name not in settled | options
        if missing and is_tensor(parameter.annotation):
            raise ConfigError(f"{where}: {name} {ONLY_PYTHON}")
    return partial(function, **given, **options) if options or given else function


def check_options(function: Any, where: str, options: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for an option that `function` does not have, or of another kind than it asks for."""
    if not options:
        return
    parameters = parameters_of(function, where)
    allowed = [name for name in parameters if name not in given]
    for name, value in options.items():
        if name not in allowed:
            raise ConfigError(
                f"{where}: unknown option {name} = {value!r}; allowed: {', '.join(allowed) or 'none'}"
                f"{nearest(name, allowed)}"
            )
        if is_tensor(parameters[name].annotation) and not isinstance(value, torch.Tensor):
            raise ConfigError(f"{where}: {name} {ONLY_PYTHON}")
        if kind := _other_kind(value, parameters[name].annotation):
            raise ConfigError(f"{where}: {name} = {value!r} must be {kind}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}: {name} = {value!r} must be a finite number")


def construct(function: Callable[..., Any], where: str, *arguments: Any, **options: Any) -> Any:
    """Call `function`; what it refuses becomes a `ConfigError` that says where."""
    try:
        return function(*arguments, **options)
    except ConfigError as error:
        raise type(error)(f"{where}: {error}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {_in_one_line(error)}") from error


def check_type(built: Any, kind: type, where: str) -> None:
    """Raise `ConfigError` unless `built` is a `kind`."""
    if not isinstance(built, kind):
        raise ConfigError(f"{where}: gives a {type(built).__name__}, must give a {kind.__module__}.{kind.__name__}")


@torch.no_grad()
def try_out(module: nn.Module, where: str, dim: int) -> None:
    """Send one zero token through a layer or router with a reader's own part, in eval mode; random numbers stay.

    Does nothing on the meta device, where a part that reads values cannot run.
    """
    if torch.get_default_device().type == "meta":
        return
    try:
        with torch.random.fork_rng(devices=[]):
            module.eval()(torch.zeros(1, dim), token_ids=torch.zeros(1, dtype=torch.int64))
    except Exception as error:  # somebody else's code may raise anything
        raise ConfigError(f"{where}: fails on one token: {_in_one_line(error)}") from error
    module.train()


def is_tensor(annotation: Any) -> bool:
    """Return whether an annotation asks for a tensor, or a tensor or none.

    >>> is_tensor(torch.Tensor), is_tensor(torch.Tensor | None), is_tensor(int | None)
    (True, True, False)
    """
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType] or [annotation]
    return all(getattr(kind, "__module__", "").partition(".")[0] in ("torch", "jaxtyping") for kind in kinds)


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 1]}…"


def _other_kind(value: Any, annotation: Any) -> str:
    """Return in words which plain kind `annotation` asks for if `value` is of another; what is not plain passes."""
    kinds = set(get_args(annotation)) if isinstance(annotation, UnionType) else {annotation}
    if not kinds <= {*KINDS, NoneType} or type(value) in kinds or (type(value) is int and float in kinds):
        return ""
    return " or ".join(word for kind, word in KINDS.items() if kind in kinds)
