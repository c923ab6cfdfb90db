"""What those who record operators, such as `torch.compile`, are told of functions that they cannot look into."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """Mark a function whose result is a constant to a compiled graph.

    As `torch.compiler.assume_constant_result`, without importing the compiler, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_recorded(*tensors: Tensor) -> bool:
    """Return whether somebody may see what is done with these tensors: they must not be changed past torch's operators.

    That is a compiler, a tracer, a mode such as a counter of FLOPs, or the tensors' own class.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or is_in_torch_dispatch_mode():
        return True
    return any(type(tensor) is not Tensor for tensor in tensors)
