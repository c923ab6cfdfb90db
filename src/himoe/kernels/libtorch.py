"""Functions of the loaded torch's own libraries, its BLAS and its OpenMP, by address."""

import ctypes
import functools
from pathlib import Path

import torch


@functools.cache
def symbol(name: str) -> int | None:
    """Return the address of a C function that libtorch_cpu holds or has loaded, None where there is none."""
    folder = Path(torch.__file__).parent / "lib"
    for library in sorted(folder.glob("libtorch_cpu.*")):
        function = getattr(ctypes.CDLL(str(library)), name, None)
        if function is not None:
            return ctypes.cast(function, ctypes.c_void_p).value
    return None
