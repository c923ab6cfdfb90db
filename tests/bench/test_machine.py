import json

from himoe.bench.machine import compiler, diagnosis, environment, versions
from himoe.kernels import BACKENDS


def test_the_diagnosis_says_which_backend_runs():
    found = diagnosis()
    json.dumps(found, allow_nan=False)
    assert set(found["backends"]) == set(BACKENDS)
    for choice in found["choices"]:
        assert found["backends"][choice["backend"]] is None, "auto takes one that cannot run"
    assert {choice["dtype"] for choice in found["choices"]} == {"fp32", "bf16"}
    assert found["thread_settings"]["in_operators"] == found["threads"]


def test_the_environment_has_what_results_are_quoted_with():
    found = environment("cpu")
    assert found["device"] == "cpu" and found["torch"] and found["matmul_gflops"]["fp32"] > 0
    assert found["blas"] != "unknown"
    assert versions()["transformers"] and versions()["numpy"]


def test_a_compiler_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiler() == {"name": "no-such-compiler", "path": None, "version": None}
