"""`himoe bench`: what it refuses, what it prints, and the JSON that programs read."""

import json

import pytest
import torch

from himoe.bench import layer
from himoe.bench.peers import PEERS, Peer
from himoe.cli import main

TINY = ["--shape", "24,16,8,4,2", "--seconds", "0.01", "--threads", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _threads():
    """Put the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def wrong_peer(monkeypatch):
    """Let a peer of the table give a wrong output."""

    def build(problem):
        contestant = layer.ours(problem, "loop")
        forward = contestant.forward
        contestant.forward = lambda: forward() * 1.01
        return contestant

    monkeypatch.setitem(PEERS, "dense", Peer(build))


def bench(capsys, *arguments):
    """Return the exit status and what was printed."""
    status = main(["bench", *arguments])
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name one of layer, train, model, doctor"),
        (["lyer"], "no verb 'lyer' of bench; known: layer, train, model, doctor; did you mean 'layer'?"),
        (["layer", "--shape", "e65"], "--shape e65: no such name, and not five numbers T,D,F,E,K"),
        (["layer", "--shape", "1,2,3,4,5"], "K at most E"),
        (["layer", "--dtype", "fp16"], "--dtype is 'fp16'; known: fp32, bf16"),
        (
            ["layer", "--routing", "unifrom"],
            "--routing is 'unifrom'; known: uniform, zipf, one_hot, real; did you mean",
        ),
        (["layer", "--routing", "real"], "--routing real needs a trained run: add --run RUN"),
        (["layer", "--peer", "dens"], "--peer is 'dens'; known: dense,"),
        (["layer", "--backend", "lop"], "did you mean 'loop'?"),
        (["layer", "--seconds", "0"], "--seconds is 0.0; it must be above 0"),
        (["layer", "--threads", "0"], "--threads is 0; it must be at least 1"),
        (["layer", "--device", "tpu"], "--device is 'tpu'; it must be cpu or cuda"),
        (["layer", "--plot", "no/where.html"], "there is no folder no"),
        (["layer", "--run", "nowhere", *TINY], "run folder nowhere does not exist"),
        (
            ["layer", "--sahpe", "e64"],
            "unknown option '--sahpe'; did you mean '--shape'? (see himoe bench layer --help)",
        ),
        (["train", "--steps", "0"], "--steps is 0; it must be at least 1"),
        (["train", "no_recipe"], "no_recipe"),
        (["train", "lm_tiny", "--device", "cpu"], "leave it out"),
        (["model", "--peer", "grouped"], "--peer is 'grouped'; known: grouped_mm, eager; did you mean 'grouped_mm'?"),
        (["model", "--top-k", "6", "--device", "cpu"], "moe.top_k"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = bench(capsys, *arguments)
    assert status == 2 and out == "" and err.startswith("himoe: ") and err.count("\n") == 1
    assert message in err


def test_help_of_every_verb_has_examples(capsys):
    for verb in ("layer", "train", "model", "doctor"):
        assert main(["help", "bench", verb]) == 0
        assert f"himoe bench {verb}" in capsys.readouterr().out.partition("Examples:")[2]


def test_layer_prints_one_json_document(capsys):
    status, out, _ = bench(capsys, "layer", *TINY, "--routing", "uniform", "--routing", "zipf", "--json")
    found = json.loads(out)
    assert status == 0 and len(found["rows"]) == 2
    row = found["rows"][0]
    assert row["shape"] == {"name": "24,16,8,4,2", "T": 24, "D": 16, "F": 8, "E": 4, "K": 2}
    assert (row["dtype"], row["routing"]) == ("fp32", "uniform")
    assert {"dense", "hf_grouped", "hf_eager"} <= set(row["ratio_vs"])
    assert all(isinstance(ratio, float) and ratio > 0 for ratio in row["ratio_vs"].values())
    assert row["ratio_vs"] == row["backends"][row["backend"]]["ratio_vs"]
    summary = found["summary"][row["backend"]]["hf_grouped"]
    assert summary["cases"] == 2 and summary["worst"] == min(row["ratio_vs"]["hf_grouped"] for row in found["rows"])
    assert found["skew"][row["backend"]]["worst_case"] == "24,16,8,4,2 fp32"
    assert found["unavailable"]["liger"] == "needs a GPU"
    assert found["environment"]["threads"] == 1 and found["settings"]["seed"] == 0


def test_layer_prints_tables_and_says_who_is_missing(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(PEERS, "st_moe", Peer(lambda _: None, "no_such_package", "pip install it"))
    status, out, _ = bench(capsys, "layer", *TINY, "--peer", "dense", "--peer", "st_moe")
    assert status == 0
    for words in ("Time of the peer over ours", "peak MiB", "loop vs dense:", "st_moe not installed: pip install it"):
        assert words in out


def test_a_wrong_peer_is_an_exit_status_of_its_own(capsys, wrong_peer):
    status, out, _ = bench(capsys, "layer", *TINY, "--peer", "dense", "--peer", "hf_grouped")
    assert status == 1
    assert "wrong 24,16,8,4,2 fp32 uniform: dense relative error of y" in out.replace("\n", " ")
    status, out, _ = bench(capsys, "layer", *TINY, "--peer", "dense", "--json")
    assert status == 1 and "relative error" in json.loads(out)["rows"][0]["failed"]["dense"]


def test_quick_ends_in_time_and_says_what_it_left_out(capsys, monkeypatch):
    monkeypatch.setattr("himoe.cli.bench_layer.QUICK_TOTAL_SECONDS", -1.0)
    two = ["--shape", "8,16,8,4,2", "--routing", "uniform", "--routing", "zipf"]
    status, out, _ = bench(capsys, "layer", *TINY, *two, "--peer", "dense", "--quick", "--json")
    found = json.loads(out)
    assert status == 0 and {row["shape"]["T"] for row in found["rows"]} == {24}
    assert found["left_out"] == ["8,16,8,4,2 fp32 uniform", "8,16,8,4,2 fp32 zipf"]


def test_the_plot_is_one_file_that_needs_no_network(capsys, tmp_path):
    page = tmp_path / "layer.html"
    status, _, err = bench(capsys, "layer", *TINY, "--peer", "dense", "--plot", str(page))
    text = page.read_text(encoding="utf-8")
    assert status == 0 and f"wrote {page}" in err
    assert "Plotly.newPlot" in text and "24,16,8,4,2" in text and "<script src" not in text


def test_parts_are_shares_of_the_layer(capsys):
    status, out, _ = bench(capsys, "layer", "--parts", *TINY, "--json")
    (found,) = json.loads(out)["parts"]
    assert status == 0 and found["parts"]["layer"]["share"] == 1
    status, out, _ = bench(capsys, "layer", "--parts", *TINY)
    assert "router + dispatch + combine + statistics:" in out


def test_train_breaks_a_step_down(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HIMOE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("".join(f"{i} words, some others, {i * i}\n\n" for i in range(2000)))
    arguments = ["train", "lm_tiny", "--data", str(tmp_path / "text.txt"), "--steps", "2", "--threads", "1"]
    status, out, _ = bench(capsys, *arguments, "--json")
    found = json.loads(out)
    assert status == 0 and found["recipe"] == "lm_tiny" and found["steps"] == 2
    assert sum(part["share"] for part in found["parts"].values()) == pytest.approx(1)
    assert {"attention", "router", "dispatch", "experts", "loss", "optimizer", "statistics", "data", "rest"} <= set(
        found["parts"]
    )
    status, out, _ = bench(capsys, *arguments)
    assert "100.0%" in out and "without the clock" in out
    assert not list(tmp_path.glob("runs*"))


def test_model_compares_whole_steps(capsys):
    sizes = ["--layers", "1", "--dim", "16", "--experts", "8", "--top-k", "4", "--hidden-dim", "8", "--tokens", "16"]
    status, out, _ = bench(capsys, "model", *sizes, "--steps", "1", "--threads", "1", "--device", "cpu", "--json")
    found = json.loads(out)
    assert status == 0 and found["peer"] == "hf_grouped" and found["ratio"] > 0 and found["amdahl_bound"] > 0
    status, out, _ = bench(capsys, "model", *sizes, "--steps", "1", "--threads", "1", "--device", "cpu")
    assert "Amdahl's bound" in out


def test_doctor_names_every_backend(capsys):
    status, out, _ = bench(capsys, "doctor")
    assert status == 0 and "What auto takes" in out and "BLAS" in out
    status, out, _ = bench(capsys, "doctor", "--json")
    assert json.loads(out)["backends"]["loop"] is None
