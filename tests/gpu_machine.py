"""What a machine for `make gpu-check` has and lacks: `python tests/gpu_machine.py`, exit status 1 if anything lacks.

The machine may have no network, so its Python must hold torch, triton and the tools of the tests. The command line's
three packages may come along: `make gpu-packages` fetches them into .gpu-packages where there is a network.
"""

import importlib
import sys

OF_THE_MACHINE = ("torch", "triton", "numpy", "jaxtyping", "pytest", "xdist", "hypothesis")
TAKEN_ALONG = ("tyro", "pydantic", "rich")
PEERS = ("transformers", "liger_kernel", "scattermoe", "sonicmoe", "st_moe_pytorch")


def version(name: str) -> str | None:
    """Return the version of a package that can be imported, else None."""
    try:
        return getattr(importlib.import_module(name), "__version__", "of no number")
    except ImportError:
        return None


def main() -> int:
    """Print what is here and say what is not."""
    if "--packages" in sys.argv:
        print(*TAKEN_ALONG)
        return 0
    found = {name: version(name) for name in (*OF_THE_MACHINE, *TAKEN_ALONG, *PEERS)}
    print("Python", sys.version.split()[0], "·", " · ".join(f"{name} {v}" for name, v in found.items() if v))
    problems = [f"{name} is not installed" for name in OF_THE_MACHINE if not found[name]]
    problems += [
        f"{name} is not installed: `make gpu-packages` where there is a network, and take .gpu-packages along"
        for name in TAKEN_ALONG
        if not found[name]
    ]
    if found["torch"]:
        import torch

        if torch.cuda.is_available():
            print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), "CUDA", torch.version.cuda)
        else:
            problems.append("torch sees no CUDA device")
    print(*problems, sep="\n", end="\n" if problems else "")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
