"""Every implementation that is installed is right, on shapes and routings that are not even."""

import pytest
import torch

from himoe.bench import right
from himoe.bench.clock import race
from himoe.bench.contestant import CannotRunError
from himoe.bench.layer import Settings, measure, ours
from himoe.bench.peers import PEERS, Peer
from himoe.bench.problem import make_problem
from himoe.bench.shapes import Shape
from himoe.kernels import BACKENDS, backend_status

SHAPE = Shape("small", tokens=48, dim=16, hidden_dim=24, num_experts=6, top_k=2)
ROUTINGS = ("uniform", "zipf", "one_hot")
INSTALLED = [name for name, peer in PEERS.items() if peer.missing("cpu") is None]


def settings(**changes):
    known = {"backends": ["loop"], "backend": "loop", "peers": [], "seconds": 0.0}
    return Settings(**(known | changes))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_peer_is_right(name, routing, dtype):
    if dtype not in PEERS[name].dtypes:
        pytest.skip("not its dtype")
    [row] = measure(SHAPE, dtype, {routing: None}, settings(peers=[name]))
    assert row["failed"] == {} and row["not_run"] == {}
    assert set(row["times"]) == {"loop", name} and 0 < row["times"][name]["error"] <= right.TOLERANCE[dtype]


def test_all_routings_of_a_shape_are_timed_in_turns(monkeypatch):
    races = []
    monkeypatch.setattr("himoe.bench.layer.race", lambda *given, **how: races.append(given) or race(*given, **how))
    rows = measure(SHAPE, "fp32", {"uniform": None, "one_hot": None}, settings(peers=["hf_grouped"], seconds=0.01))
    [(steps, seconds)] = races
    assert set(steps) == {f"{routing} {name}" for routing in ("uniform", "one_hot") for name in ("loop", "hf_grouped")}
    assert seconds == 0.02  # that of each
    assert [row["routing"] for row in rows] == ["uniform", "one_hot"]
    assert all(row["failed"] == {} and set(row["times"]) == {"loop", "hf_grouped"} for row in rows)
    assert rows[0]["largest_load"] < rows[1]["largest_load"] == SHAPE.num_experts / SHAPE.top_k


def test_transformers_is_here():
    assert {"hf_grouped", "hf_eager", "dense"} <= set(INSTALLED)  # a part of the development setup


@pytest.mark.parametrize("backend", [name for name, reason in backend_status().items() if reason is None])
def test_every_backend_of_ours_is_right_or_says_that_it_does_not_take_the_shape(backend):
    [row] = measure(SHAPE, "fp32", {"zipf": None}, settings(backends=[backend]))
    assert row["failed"] == {}
    assert backend in row["times"] or "would run" in row["not_run"][backend]


def test_backend_status_knows_every_backend():
    status = backend_status()
    assert list(status) == list(BACKENDS) and status["loop"] is None


def test_a_backend_that_another_one_replaces_is_not_taken_for_it():
    odd = Shape("odd", tokens=8, dim=7, hidden_dim=3, num_experts=4, top_k=2)
    problem = make_problem(odd, "fp32", "uniform")
    with pytest.raises(CannotRunError, match="loop would run"):
        ours(problem, "grouped")
    [row] = measure(odd, "fp32", {"uniform": None}, settings(backends=["loop", "grouped"]))
    assert set(row["backends"]) == {"loop"} and "loop would run" in row["not_run"]["grouped"]


def broken(change):
    """A peer that is ours, with something wrong."""

    def build(problem):
        contestant = ours(problem, "loop")
        forward = contestant.forward
        contestant.forward = lambda: change(problem, forward())
        return contestant

    return Peer(build)


def wrong_output(problem, y):
    return y * 1.001


def wrong_gradient(problem, y):
    return y.detach() + 0.5 * (y - y.detach())


def forgets_a_token(problem, y):
    return torch.cat([y[:-1], y[-1:] * 0])


@pytest.mark.parametrize("change", [wrong_output, wrong_gradient, forgets_a_token])
def test_a_wrong_peer_is_reported_and_not_timed(change):
    known = {**PEERS, "wrong": broken(change)}
    [row] = measure(SHAPE, "fp32", {"uniform": None}, settings(peers=["wrong", "dense"], known=known))
    assert "relative error of" in row["failed"]["wrong"]
    assert "wrong" not in row["times"] and "wrong" not in row["ratio_vs"] and "dense" in row["ratio_vs"]


def test_a_peer_that_breaks_down_is_named_with_its_error():
    def build(problem):
        raise RuntimeError("no such kernel\nand more")

    [row] = measure(SHAPE, "fp32", {"uniform": None}, settings(peers=["gone"], known={"gone": Peer(build)}))
    assert row["not_run"]["gone"] == "RuntimeError: no such kernel" and row["failed"] == {}


def test_what_a_peer_needs_is_said():
    assert PEERS["liger"].missing("cpu") == "needs a GPU"
    assert Peer(broken, "no_such_package", "pip install it").missing("cpu") == "not installed: pip install it"
    [row] = measure(SHAPE, "bf16", {"uniform": None}, settings(peers=["st_moe"]))
    assert row["not_run"] == {"st_moe": "takes fp32 only"}


def test_st_moe_is_not_tried_where_its_dispatch_tensors_would_fill_the_memory():
    pytest.importorskip("st_moe_pytorch")
    shape = Shape("", tokens=4096, dim=4, hidden_dim=4, num_experts=64, top_k=8)
    with pytest.raises(CannotRunError, match="GiB"):
        PEERS["st_moe"].build(make_problem(shape, "fp32", "uniform"))


def test_a_row_has_the_form_that_programs_read():
    [row] = measure(
        SHAPE, "fp32", {"uniform": None}, settings(backends=["loop", "grouped"], peers=["dense", "hf_grouped"])
    )
    assert row["shape"] == {"name": "small", "T": 48, "D": 16, "F": 24, "E": 6, "K": 2}
    assert (row["dtype"], row["routing"], row["backend"]) == ("fp32", "uniform", "loop")
    times = row["times"]
    for peer in ("dense", "hf_grouped"):
        assert row["ratio_vs"][peer] == pytest.approx(times[peer]["minimum_ms"] / times["loop"]["minimum_ms"])
        assert row["saved_vs"][peer] == pytest.approx(times["loop"]["saved_mib"] / times[peer]["saved_mib"])
        other = row["backends"]["grouped"]["ratio_vs_cpu"][peer]
        assert other == pytest.approx(times[peer]["cpu_ms"] / times["grouped"]["cpu_ms"])
    assert row["fraction_of_dense"] == row["ratio_vs"]["dense"]
    gflops = 18 * 48 * 2 * 16 * 24 / times["loop"]["minimum_ms"] / 1e6
    assert times["loop"]["gflops"] == pytest.approx(gflops)
    [row] = measure(SHAPE, "fp32", {"uniform": None}, settings(backends=["loop", "grouped"], backend="grouped"))
    assert row["backend"] == "grouped"
