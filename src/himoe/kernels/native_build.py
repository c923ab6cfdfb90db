"""Compile the C++ kernel of backend `native` on first use, and keep the library for later processes.

The main source includes nothing of torch, so the compiler takes some seconds. A library is kept in
`$XDG_CACHE_HOME/himoe` (default `~/.cache/himoe`) under a name that hashes the source, the compiler and its version,
the flags, torch's version and the processor (`-march=native`), and last the library itself: one that is damaged does
not fit its name and is built again. It is compiled beside its final name and renamed, so that processes which build
at once leave one whole file. Only what this user or root owns is loaded, for loading it runs it.
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("csrc")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
TORCH = Path(torch.__file__).parent
WITH_TORCH = (  # for a source that includes torch; the libraries are those that are loaded already
    *("-O2", "-std=c++20", "-fPIC", "-shared", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"),
    *(f"-I{TORCH / 'include'}", f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"),
)
logger = logging.getLogger("himoe")


class BuildError(Exception):
    """Why there is no library; the fallback keeps the text."""


def find_compiler() -> str:
    """Return the path of `$CXX`, or of the first of c++, g++ and clang++ on the path."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if found := shutil.which(name):
            return found
    raise BuildError(f"no C++ compiler: {' and '.join(names)} not found")


def library_path(name: str, flags: tuple[str, ...] | None = None) -> Path:
    """Return the library compiled from `csrc/NAME.cpp`, building it when the cache has none. Raises BuildError."""
    compiler = find_compiler()
    flags = FLAGS if flags is None else flags
    command = [compiler, str(SOURCE / f"{name}.cpp"), *flags]  # sources before libraries, as linkers want it
    key = f"{name}-{_key(command)}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "himoe"  # noqa: PTH111
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _trusted(cache):
            raise BuildError(f"{cache} belongs to another user; set XDG_CACHE_HOME to a folder of your own")
        for path in sorted(cache.glob(f"{key}-*.so")):
            if _trusted(path) and path.name == f"{key}-{_digest(path)}.so":
                return path
            path.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = _compile(command, Path(folder) / f"{name}.so")
            with built.open("rb") as file:
                os.fsync(file.fileno())  # or a crash could leave half a library under the final name
            return built.replace(cache / f"{key}-{_digest(built)}.so")
    except OSError as error:
        raise BuildError(f"cannot write {cache}: {error.strerror or error}") from error


def _trusted(path: Path) -> bool:
    return not hasattr(os, "getuid") or path.stat().st_uid in (0, os.getuid())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _compile(command: list[str], built: Path) -> Path:
    compiler, start = command[0], time.monotonic()
    try:
        done = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{compiler} took longer than {error.timeout:.0f} s") from error
    except OSError as error:
        raise BuildError(f"{compiler} does not run: {error}") from error
    if done.returncode:
        lines = (done.stderr.strip() or "no message").splitlines()
        raise BuildError(f"{compiler} failed: {next((line for line in lines if 'error' in line), lines[0])}")
    logger.info("built %s with %s in %.1f s", built.name, compiler, time.monotonic() - start)
    return built


def _key(command: list[str]) -> str:
    try:
        version = subprocess.run([command[0], "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    parts = [*command, version.stdout, torch.__version__, _processor()]
    parts += [path.read_text(encoding="utf-8") for path in sorted(SOURCE.iterdir()) if path.suffix in (".cpp", ".h")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Name the instruction set: a home folder may be shared by machines that differ in it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
