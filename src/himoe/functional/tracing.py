"""What `torch.compile` is told of functions that it cannot look into."""

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """Mark a function whose result is a constant to a compiled graph.

    As `torch.compiler.assume_constant_result`, without importing the compiler, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
