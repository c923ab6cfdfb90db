"""Selectors and scores are plain functions, often with options bound by `functools.partial`; these look beneath it."""

from collections.abc import Callable
from typing import Any


def unbound(function: Callable[..., Any]) -> Any:
    """Return the function itself, which carries the attributes such as `causal`, without what is bound to it.

    >>> from functools import partial
    >>> unbound(partial(max, key=len)) is max
    True
    """
    return getattr(function, "func", function)


def bound_options(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the options that are bound by name."""
    return dict(getattr(function, "keywords", {}))


def name_of(function: Callable[..., Any]) -> str:
    """Return a function's name, or that of a callable object's class."""
    function = unbound(function)
    return getattr(function, "__name__", type(function).__name__)
