import pytest

from himoe.bench.ratios import amdahl, geometric_mean, ratios, skew, summarize


def row(name, routing, backends, times=None, dtype="fp32"):
    """A row with ratios by backend and peer, and each backend's time."""
    return {
        "shape": {"name": name},
        "dtype": dtype,
        "routing": routing,
        "backends": {
            backend: {"ratio_vs": ratio_vs, "ratio_vs_cpu": {peer: 2 * ratio for peer, ratio in ratio_vs.items()}}
            for backend, ratio_vs in backends.items()
        },
        "times": {backend: {"minimum_ms": (times or {}).get(backend, 1.0)} for backend in backends},
    }


def test_a_ratio_is_the_peers_time_over_ours():
    assert ratios(0.5, {"slower": 1.0, "faster": 0.25}) == {"slower": 2.0, "faster": 0.5}


def test_geometric_means():
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert geometric_mean([1.0, 2.0, 4.0]) == pytest.approx(2.0)
    assert geometric_mean([]) is None


def test_amdahl_is_exact_at_its_ends():
    assert amdahl(0.0, 10.0) == 1.0  # nothing to win where nothing is
    assert amdahl(1.0, 3.0) == pytest.approx(3.0)
    assert amdahl(0.5, 2.0) == pytest.approx(4 / 3)
    assert amdahl(0.7, 1e12) == pytest.approx(1 / 0.3)


def test_the_summary_names_the_worst_case_of_every_backend_and_peer():
    rows = [
        row("small", "uniform", {"loop": {"hf": 1.0, "dense": 0.5}, "native": {"hf": 2.0}}),
        row("large", "zipf", {"loop": {"hf": 4.0}, "native": {"hf": 0.5}}),
    ]
    found = summarize(rows)
    assert found["loop"]["hf"]["geometric_mean"] == pytest.approx(2.0)
    assert found["loop"]["hf"]["geometric_mean_cpu"] == pytest.approx(4.0)
    assert found["native"]["hf"]["worst"] == 0.5 and found["native"]["hf"]["worst_case"] == "large fp32 zipf"
    assert found["loop"]["dense"]["cases"] == 1


def test_skew_compares_the_same_shape_and_dtype_only():
    rows = [
        row("a", "uniform", {"loop": {}}, {"loop": 10.0}),
        row("a", "zipf", {"loop": {}}, {"loop": 11.0}),
        row("a", "zipf", {"loop": {}}, {"loop": 99.0}, dtype="bf16"),  # its uniform twin was not measured
        row("b", "zipf", {"loop": {}}, {"loop": 99.0}),
    ]
    assert skew(rows) == {"loop": {"worst": pytest.approx(1.1), "worst_case": "a fp32"}}
