"""Backend `native` where experts have few rows, where its library is damaged or foreign, and where it fails."""

import ctypes
import os
import subprocess

import pytest
import torch
from expert_case import NAMES, assert_equal, make_case, run

from himoe.errors import KernelError
from himoe.kernels import loop, native, native_build

needs_kernel = pytest.mark.skipif(not native.available(), reason=native.status().reason)
ROWS = (0, 1, 7, 8, 9, 15, 16, 17, 33, 48, 49)
SIZES = {
    "columns that fill no vector": {"width": 37, "units": 21},
    "whole panels": {"width": 32, "units": 16},
    "narrower than a vector": {"width": 3, "units": 5, "activation": "gelu"},
    "long sums over the width": {"width": 261, "units": 6, "activation": "relu2"},
    "long sums over the units": {"width": 6, "units": 259},
    "rows of many blocks": {"width": 2085, "units": 1},
}


@pytest.fixture
def threads():
    """Set the number of threads in a test, and set it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_kernel
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("name", SIZES)
def test_few_rows_are_the_reference_and_threads_change_no_bit(name, dtype, tolerance, threads):
    case = make_case(tokens=sum(ROWS), num_experts=len(ROWS), k=1, kept="all", **SIZES[name])
    case.expert_ids = torch.repeat_interleave(torch.arange(len(ROWS)), torch.tensor(ROWS))[:, None]
    case.expert_ids = case.expert_ids[torch.randperm(sum(ROWS), generator=torch.Generator().manual_seed(1))]
    for n in NAMES:  # a rounded input may lie on the other side of a ReLU's kink
        setattr(case, n, getattr(case, n).to(dtype).double())
    threads(1)
    one = run(case, backend="native", dtype=dtype)
    assert_equal(one, run(case, backend="reference"), tolerance)
    threads(2)
    y, grads = run(case, backend="native", dtype=dtype)
    assert torch.equal(y, one[0]) and all(torch.equal(grads[n], one[1][n]) for n in NAMES)


@needs_kernel
@pytest.mark.parametrize("tokens", [1, 7, 48, 49, 97, 130])
@pytest.mark.parametrize(("width", "units"), [(600, 520), (300, 264), (1040, 72)])
def test_what_a_token_becomes_does_not_depend_on_how_many_there_are(tokens, width, units):
    case = make_case(tokens=400, width=width, units=units, num_experts=1, k=1, kept="all")
    whole, whole_grads = run(case, backend="native", dtype=torch.float32, upstream=case.x)
    for name in ("x", "weights", "expert_ids", "kept"):
        setattr(case, name, getattr(case, name)[:tokens])
    part, grads = run(case, backend="native", dtype=torch.float32, upstream=case.x)
    assert torch.equal(part, whole[:tokens])
    assert all(torch.equal(grads[n], whole_grads[n][:tokens]) for n in ("x", "weights"))


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A compiler that writes a line into the library and notes that it ran; returns the file of notes."""
    script, notes = tmp_path / "cxx", tmp_path / "notes"
    script.write_text(
        f'#!/bin/sh\nfor last; do :; done\n[ "$last" = --version ] || echo run | tee -a {notes} >"$last"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return notes


def give_away(path, monkeypatch):
    """Let a path belong to somebody else."""
    if os.getuid():
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    else:
        os.chown(path, 12345, -1)


def test_a_damaged_library_is_built_again(compiler):
    path = native_build.library_path("expert_mlp")
    assert native_build.library_path("expert_mlp") == path
    assert compiler.read_text() == "run\n"
    path.write_text("ru")
    assert native_build.library_path("expert_mlp") == path
    assert path.read_text() == "run\n"
    assert compiler.read_text() == "run\nrun\n"


def test_a_library_of_another_user_is_built_again_and_a_folder_of_another_user_refused(compiler, monkeypatch):
    path = native_build.library_path("expert_mlp")
    if not os.getuid():
        give_away(path, monkeypatch)
        assert native_build.library_path("expert_mlp") == path
        assert path.stat().st_uid == 0
        assert compiler.read_text() == "run\nrun\n"
    give_away(path.parent, monkeypatch)
    with pytest.raises(native_build.BuildError, match="belongs to another user; set XDG_CACHE_HOME"):
        native_build.library_path("expert_mlp")


@needs_kernel
def test_no_memory_for_the_tasks_is_an_error_not_an_abort(monkeypatch):
    class Huge(native._Problem):
        def __init__(self, **fields):
            super().__init__(**(fields | {"experts": 2**60}))

    case = make_case()
    monkeypatch.setattr(native, "_Problem", Huge)
    with pytest.raises(KernelError, match=r"ran out of memory or failed with up_proj \(5, 16, 16\).* 14 pairs"):
        run(case, backend="native", dtype=torch.float32)


@needs_kernel
def test_a_product_that_throws_on_a_thread_is_an_error_not_an_abort(tmp_path, monkeypatch, threads):
    source, library = tmp_path / "throws.cpp", tmp_path / "throws.so"
    source.write_text('extern "C" void throws() { throw 1; }')
    subprocess.run([native_build.find_compiler(), source, "-fPIC", "-shared", "-o", library], check=True)
    throws = ctypes.CDLL(str(library)).throws
    monkeypatch.setattr(native, "_half_gemm", lambda: ctypes.cast(throws, ctypes.c_void_p).value)
    monkeypatch.setattr(loop, "multiplies_bf16", lambda: True)
    threads(2)
    with pytest.raises(KernelError, match="backend native"):
        run(make_case(), backend="native", dtype=torch.bfloat16)
