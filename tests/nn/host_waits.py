"""Whether code would make the host wait for a GPU, found on the meta device: no GPU is needed.

The meta device stands for the GPU: its tensors have no values, so whatever reads one, or has a shape that depends on
them, cannot run; and every copy between it and the host is noted, since one from ordinary memory waits too.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_consecutive"}
COPIES = {"_to_copy", "copy_", "copy"}


class HostWaits(TorchDispatchMode):
    """Note the operators that read values on the host, and those that bring tensors from one device to the other.

    A 0-d tensor of the host beside one of the GPU is a number among a kernel's arguments and does not wait.
    """

    def __init__(self):
        super().__init__()
        self.found, self.seen = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.seen.add(name)
        if name in READS:
            self.found.append(str(func))
        out = func(*args, **(kwargs or {}))
        tensors = [v for v in pytree.tree_leaves((args, kwargs, out)) if isinstance(v, torch.Tensor)]
        on_host = [v for v in tensors if v.device.type == "cpu"]
        behind_the_host = (kwargs or {}).get("non_blocking", False)  # of pinned memory, see `functional/constants.py`
        mixed = 0 < len(on_host) < len(tensors) and not behind_the_host
        if mixed and (name in COPIES or any(v.ndim for v in on_host)):
            self.found.append(f"{func} between host and device")
        return out


class MadeOfNumbers(TorchFunctionMode):
    """Note tensors of the GPU made of Python's numbers: those are written in the host's memory, then copied."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and out.device.type != "cpu":
            data = args[1] if func is torch.Tensor.new_tensor else args[0]
            if not isinstance(data, torch.Tensor):
                self.found.append(f"{func.__name__} of {data}")
        if func is torch.Tensor.__getitem__ and out.device.type != "cpu":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.found += [f"index {i}" for i in index if isinstance(i, list)]
        return out


def host_waits(run):
    """Return what `run(device)` does that would wait for the device, and the names of all its operators."""
    with HostWaits() as waits, MadeOfNumbers(waits.found):
        run(torch.device("meta"))
    return waits.found, waits.seen
