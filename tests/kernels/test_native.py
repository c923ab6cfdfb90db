"""Backend `native`: how it is built, what happens without a compiler, and that threads change no bit."""

import os
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from expert_case import NAMES, assert_equal, make_case, run

from himoe.kernels import expert_mlp, loop, native, native_build

needs_kernel = pytest.mark.skipif(not native.available(), reason=native.status().reason)
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


@pytest.fixture
def threads():
    """Set the number of threads in a test, and set it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def in_a_process(code, tmp_path, **environment):
    """Run code in a Python of its own with an empty cache; return what it printed."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LARGE = {
    # more than one row tile, row chunk of a gradient and block of a gradient; odd sizes
    "one expert has everything": {"tokens": 1200, "num_experts": 3, "k": 1, "spread": "one", "width": 75, "units": 83},
    "half the experts have none": {"tokens": 700, "num_experts": 8, "k": 3, "spread": "few", "width": 130, "units": 70},
    "some pairs unkept": {"tokens": 900, "num_experts": 4, "k": 2, "kept": "some", "width": 33, "units": 129},
    "many experts share the working space": {"tokens": 1500, "num_experts": 40, "k": 2, "units": 24},
    "wider than what is packed at a time": {"tokens": 1200, "num_experts": 40, "k": 2, "width": 530, "units": 150},
    "tiles of the most rows": {"tokens": 2300, "num_experts": 3, "k": 2, "width": 40, "units": 72},
    "larger than caches": {"tokens": 700, "num_experts": 16, "k": 1, "spread": "few", "width": 1040, "units": 176},
    "larger than caches, odd": {"tokens": 700, "num_experts": 16, "k": 1, "spread": "few", "width": 1043, "units": 179},
    "wide rows of long sums": {"tokens": 400, "num_experts": 2, "k": 1, "width": 300, "units": 1301},
    "gelu": {"tokens": 900, "num_experts": 4, "k": 2, "activation": "gelu", "width": 33, "units": 129},
    "relu": {"tokens": 900, "num_experts": 4, "k": 2, "activation": "relu", "width": 129, "units": 33},
    "relu2": {"tokens": 900, "num_experts": 4, "k": 2, "activation": "relu2", "width": 129, "units": 33},
}


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LARGE)
def test_many_tiles_are_the_loop_in_fp64_and_threads_change_no_bit(name, dtype, threads):
    case = make_case(**({"kept": "all"} | LARGE[name]))
    for n in NAMES:  # a rounded input may lie on the other side of a ReLU's kink
        setattr(case, n, getattr(case, n).to(dtype).double())
    results = []
    for count in (1, 2, 24):
        threads(count)
        results.append(run(case, backend="native", dtype=dtype))
    assert_equal(results[0], run(case, backend="loop"), TOLERANCE[dtype])
    for y, grads in results[1:]:
        assert torch.equal(y, results[0][0])
        assert all(torch.equal(grads[n], results[0][1][n]) for n in NAMES)


@needs_kernel
@pytest.mark.parametrize("spread", ["all", "few", "one"])
def test_products_in_bf16_instructions(spread, monkeypatch, threads):
    """Where torch has bf16 products they are used; without such instructions torch computes them slowly."""
    monkeypatch.setattr(loop, "multiplies_bf16", lambda: True)
    if not native.available(torch.bfloat16):
        pytest.skip(native.status(torch.bfloat16).reason)
    case = make_case(tokens=1200, width=130, units=70, num_experts=4, k=1, kept="all", spread=spread)
    results = []
    for count in (1, 24):
        threads(count)
        results.append(run(case, backend="native", dtype=torch.bfloat16))
    assert_equal(results[0], run(case, backend="loop"), 4e-2)
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][n], results[1][1][n]) for n in NAMES)


@needs_kernel
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_activations_over_their_whole_range(activation):
    # expert e's only hidden unit is x itself; y = act(x), and its derivative is x's gradient
    huge = torch.tensor([1e3, 1e10, 1e18, -1e3, -1e10, -1e30, -1e38])
    x = torch.cat([torch.linspace(-100, 100, 2001), torch.linspace(-1, 1, 2001), huge])[:, None]
    rows = 2 if activation == "swiglu" else 1
    up = torch.ones(1, rows, 1)
    ids, kept = torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1, dtype=torch.bool)
    found, exact = [], []
    for results, dtype, backend in ((found, torch.float32, "native"), (exact, torch.float64, "loop")):
        leaf = x.to(dtype).requires_grad_()
        one = torch.ones(len(x), 1, dtype=dtype)
        y = expert_mlp(leaf, ids, one, kept, up.to(dtype), up[:, :1].to(dtype), activation=activation, backend=backend)
        results += [y.detach(), *torch.autograd.grad(y.sum(), leaf)]
    for value, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=2e-6)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu", "relu2"])
def test_a_nan_is_not_lost(activation, dtype):
    case = make_case(activation=activation, kept="all")
    case.x[3, 1] = torch.nan
    x, *rest = case.arguments(dtype)
    y = expert_mlp(x, *rest, activation=activation, backend="native")
    assert y[3].isnan().all() and y[[0, 1, 2, 4, 5, 6]].isfinite().all()


@needs_kernel
def test_threads_of_the_program_may_call_it_at_once(threads):
    threads(2)
    case = make_case(tokens=400, width=32, units=32, num_experts=6, k=2, kept="all")
    expected, results = run(case, backend="native", dtype=torch.float32), []

    def call():
        torch.set_num_threads(2)
        results.extend(run(case, backend="native", dtype=torch.float32) for _ in range(5))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 15
    assert all(torch.equal(y, expected[0]) and torch.equal(g["x"], expected[1]["x"]) for y, g in results)


FORK = """
import os, torch
from himoe.kernels import expert_mlp
torch.set_num_threads(2)
x, ids = torch.randn(300, 32), torch.randint(0, 4, (300, 2))
arguments = (x, ids, torch.rand(300, 2), ids >= 0, torch.randn(4, 64, 32), torch.randn(4, 32, 32))
expected = expert_mlp(*arguments, backend="native")
halves = tuple(a.bfloat16() if a.is_floating_point() else a for a in arguments)
child = os.fork()
if not child:
    again = expert_mlp(*arguments, backend="native")
    os._exit(not (torch.equal(again, expected) and expert_mlp(*halves, backend="native").isfinite().all()))
_, code = os.waitpid(child, 0)
print(code)
"""


@needs_kernel
def test_a_forked_child_does_not_wait_for_threads_it_has_not_inherited(tmp_path):
    assert in_a_process(FORK, tmp_path.parent, OMP_NUM_THREADS="2").strip() == "0"


REPORT = """
import logging, torch
logging.basicConfig(level=logging.INFO, format="LOG %(message)s")
logging.getLogger().handlers[0].setStream(__import__("sys").stdout)
from himoe.kernels import choose_backend, expert_mlp, native
x, up, down = torch.randn(5, 8), torch.randn(3, 16, 8), torch.randn(3, 8, 8)
ids = torch.randint(0, 3, (5, 2))
y = expert_mlp(x, ids, torch.rand(5, 2), ids >= 0, up, down, backend="native")
assert y.isfinite().all()
print(choose_backend("auto", x, up, down), native.status().reason)
"""


ELSEWHERE = """
import sys
sys.path.insert(0, {folder!r})
from himoe.kernels import native, native_build
native_build.FLAGS = tuple({flags!r} if flag == "-march=native" else flag for flag in native_build.FLAGS)
from expert_case import NAMES, assert_equal, make_case, run
import torch
from himoe.kernels import loop
loop.multiplies_bf16 = {multiplies_bf16}
SMALL = [(9, 37, 21, 3), (200, 37, 21, 3), (300, 40, 131, 3), (150, 261, 16, 3)]
SIZES = [*SMALL, (900, 130, 70, 3), (600, 1040, 176, 16)]
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2)):
    assert native.available(dtype), native.status(dtype).reason
    for tokens, width, units, num_experts in SIZES:
        case = make_case(tokens=tokens, width=width, units=units, num_experts=num_experts, kept="all")
        result = run(case, backend="native", dtype=dtype)
        assert_equal(result, run(case, backend="loop"), tolerance)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            again = run(case, backend="native", dtype=dtype)
            assert torch.equal(again[0], result[0]) and all(torch.equal(again[1][n], result[1][n]) for n in NAMES)
"""


@needs_kernel
@pytest.mark.parametrize(
    ("compiler", "flags", "multiplies_bf16"),
    [
        ("clang++", "-march=native", "loop.multiplies_bf16"),
        ("", "-march=x86-64-v3", "lambda: False"),
        ("", "-march=x86-64-v2", "lambda: False"),
        ("clang++", "-march=x86-64-v2", "lambda: False"),
    ],
    ids=["Clang", "AVX2", "without AVX", "Clang, without AVX"],
)
def test_other_compilers_and_other_vectors(compiler, flags, multiplies_bf16, tmp_path):
    if compiler and not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    if "x86" in flags and platform.machine() != "x86_64":
        pytest.skip("another processor")
    code = ELSEWHERE.format(folder=str(Path(__file__).parent), flags=flags, multiplies_bf16=multiplies_bf16)
    in_a_process(code, tmp_path, **({"CXX": compiler} if compiler else {}))


def test_other_flags_give_another_library(tmp_path, monkeypatch):
    """Or the test above would compile the same library each time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native_build, "_compile", lambda command, built: built.write_text(" ".join(command)) and built)
    first = native_build.library_path("expert_mlp")
    monkeypatch.setattr(native_build, "FLAGS", (*native_build.FLAGS, "-g"))
    assert native_build.library_path("expert_mlp") != first


def test_it_can_be_switched_off(tmp_path):
    assert in_a_process(REPORT, tmp_path, HIMOE_NATIVE="0") == "loop switched off by HIMOE_NATIVE=0\n"


def test_without_a_compiler_the_loop_runs_and_says_why(tmp_path):
    printed = in_a_process(REPORT, tmp_path, CXX="/no/such/compiler")
    assert printed == "loop no C++ compiler: /no/such/compiler not found\n"


@pytest.mark.parametrize(
    ("script", "reason"),
    [("echo expert_mlp.cpp:1: error: no >&2; exit 1", "failed: expert_mlp.cpp:1: error: no"), ("exit 3", "failed")],
)
def test_a_compiler_that_fails_is_a_reason_not_an_error(script, reason, tmp_path):
    compiler = tmp_path / "cxx"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    printed = in_a_process(REPORT, tmp_path, CXX=str(compiler))
    assert printed.startswith(f"loop {compiler} ") and reason in printed and "LOG" not in printed
    assert not list((tmp_path / "himoe").iterdir())  # nothing half built stays


def test_a_cache_that_cannot_be_written_is_a_reason(tmp_path):
    (tmp_path / "file").write_text("")
    printed = in_a_process(REPORT, tmp_path / "file")
    assert "loop cannot write" in printed or "loop no C++ compiler" in printed


@needs_kernel
def test_it_is_built_once_with_one_line_and_found_again(tmp_path):
    first, second = in_a_process(REPORT, tmp_path), in_a_process(REPORT, tmp_path)
    assert first.count("LOG built expert_mlp") == first.count("LOG") == 1
    (library,) = (tmp_path / "himoe").iterdir()
    assert second == f"native compiled, {library}\n"


@needs_kernel
def test_processes_that_build_at_once_leave_one_whole_file(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", REPORT]
    builders = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [builder.communicate()[0] for builder in builders]
    assert all("native compiled" in text for text in printed), printed
    assert len(list((tmp_path / "himoe").iterdir())) == 1


@needs_kernel
def test_the_name_of_the_library_follows_source_compiler_and_torch(tmp_path, monkeypatch):
    command = [native_build.find_compiler(), "x.cpp"]
    keys = [native_build._key(command), native_build._key([*command, "-g"])]
    monkeypatch.setattr(torch, "__version__", "0.0")
    keys.append(native_build._key(command))
    (tmp_path / "x.cpp").write_text("// another source")
    monkeypatch.setattr(native_build, "SOURCE", tmp_path)
    keys.append(native_build._key(command))
    assert len(set(keys)) == 4


def test_the_layout_of_the_problem_is_the_sources():
    """The fields of `_Problem` are those of csrc/problem.h, in their order."""
    source = (native_build.SOURCE / "problem.h").read_text()
    body = source.split("struct Problem {")[1].split("};")[0]
    code = [line.split("//")[0] for line in body.splitlines()]
    declared = []
    for statement in " ".join(code).replace("const ", "").split(";"):
        if "(*" in statement:
            declared.append(statement.split("(*")[1].split(")")[0])
        elif statement.strip():
            declared += [name.strip(" *") for name in statement.strip().split(" ", 1)[1].split(",")]
    assert declared == [name for name, _ in native._Problem._fields_]
