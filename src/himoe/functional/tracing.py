"""What those who record operators, such as `torch.compile`, are told of functions that they cannot look into."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """Mark a function whose result is a constant to a compiled graph.

    As `torch.compiler.assume_constant_result`, without importing the compiler, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_recorded(*tensors: Tensor) -> bool:
    """Return whether somebody may see what is done with these tensors, so that all must go through torch's operators.

    That is a compiler, a tracer, a transform of functions, a mode that counts FLOPs, say, or the tensors' own class.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or torch._C._are_functorch_transforms_active():
        return True
    return torch._C._len_torch_dispatch_stack() > 0 or any(type(tensor) is not Tensor for tensor in tensors)
