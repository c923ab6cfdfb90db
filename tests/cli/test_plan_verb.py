"""`himoe plan`: what it prints, as tables and as JSON."""

import json
import subprocess
import sys

import pytest

from himoe.cli import main
from himoe.cli.amounts import count, size, work
from himoe.config import load_config
from himoe.data.tokenizer import BPETokenizer
from himoe.plan import model_names


def printed(capsys, *arguments):
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def as_json(capsys, *arguments):
    return json.loads(printed(capsys, *arguments, "--json"))


def test_the_default_is_the_default_recipe(capsys):
    found = as_json(capsys)
    assert found["name"] == "lm_demo" and found["parameters"]["total"] == 5_912_512
    assert found["shape"]["granularity"] == pytest.approx(1 / 6) and found["shape"]["sparsity"] == 4
    assert found["routing"]["combinations"] == {"flat": 1820, "grouped": 256}
    assert found["training"]["flops"] == found["training"]["tokens"] * found["flops_per_token"]["total"]
    assert found["training"]["chinchilla_tokens"] == 20 * found["parameters"]["active"]


def test_a_plan_says_all_that_its_json_says(capsys):
    lines = {line.split("  ")[0]: line for line in printed(capsys, "lm_demo").splitlines()}
    assert lines["experts"].split() == ["experts", "4.719M", "1.180M", "49.7%", "2.359", "MFLOP", "42.7%"]
    assert lines["all"].split()[1:] == ["186.0", "MiB", "(dp", "1,", "ep", "1,", "4", "sequences", "at", "once)"]
    assert lines["FLOPs of a token"].endswith(
        "16.59 MFLOP = 5.530 MFLOP forward + 11.06 MFLOP backward, 256 tokens seen"
    )
    assert lines["sets of experts"].split()[3:] == ["256", "of", "1,820"]
    assert lines["granularity F/4D"].split()[2:4] == ["1/6;", "K·g"]
    assert "warning" not in "".join(lines)


@pytest.mark.parametrize("name", model_names())
def test_every_published_model_is_planned(capsys, name):
    found = as_json(capsys, "--model", name)
    assert found["source"] and found["name"] == name
    counts = found["parameters"]
    assert counts["total"] >= counts["active"] >= counts["active_without_input_embedding"]
    assert counts["active_without_input_embedding"] > counts["active_without_embeddings"] > 0
    assert printed(capsys, "--model", name).splitlines()[1] == found["source"]


def test_a_published_model_is_trained_as_a_recipe_says(capsys):
    usual = as_json(capsys, "--model", "mixtral_8x7b")["training"]
    assert (usual["seq_len"], usual["precision"], usual["recompute"]) == (4096, "bf16", "selective")
    other = as_json(capsys, "lm_small", "--model", "mixtral_8x7b", "--set", "train.seq_len=128")["training"]
    assert (other["seq_len"], other["precision"], other["recompute"]) == (128, "fp32", "none")
    assert as_json(capsys, "--model", "himoe_paper_nanogpt")["training"]["seq_len"] == 1024


def test_slices_of_a_published_model(capsys):
    found = as_json(capsys, "--model", "sd_50m", "--sparsity", "256")
    assert found["parameters"]["total"] / 1e6 == pytest.approx(934.37, abs=0.01)
    fine = as_json(capsys, "--model", "sd_50m", "--sparsity", "256", "--granularity", "1/4")["shape"]
    assert (fine["num_experts"], fine["top_k"], fine["granularity"], fine["width"]) == (1024, 4, 0.25, 1.0)


def test_ranks(capsys):
    alone, many = (
        as_json(capsys, "olmoe_7b", *more)["memory"] for more in ([], ["--dp", "64", "--ep", "8", "--shard"])
    )
    assert (many["dp"], many["ep"], many["shard"], many["sequences"]) == (64, 8, True, 1)
    assert many["weights"] == -(-alone["weights"] // 64)


def test_what_pools_and_dense_models_have_in_their_place(capsys):
    pools = as_json(capsys, "lm_tiny", "--set", "moe.pools=[{num_experts=4}, {num_experts=4, expert_dim=64}]")["shape"]
    assert pools["granularity"] is None
    assert [pool["granularity"] for pool in pools["pools"]] == [0.25, 0.5]
    dense = as_json(capsys, "lm_small_dense")
    assert dense["routing"] is None and dense["shape"]["moe_layers"] == 0
    assert "no experts" in printed(capsys, "lm_small_dense").splitlines()[0]


def test_warnings_are_printed(capsys):
    options = ["lm_tiny", "--set", "moe.num_experts=64"]
    (warning,) = as_json(capsys, *options)["warnings"]
    assert printed(capsys, *options).splitlines()[-1] == f"warning {warning}"


def test_two_models_side_by_side(capsys):
    found = as_json(capsys, "--compare", "lm_small", "olmoe_1b_7b")
    assert [found[which]["name"] for which in ("first", "second")] == ["lm_small", "olmoe_1b_7b"]
    lines = printed(capsys, "--compare", "lm_small", "lm_small_dense").splitlines()
    rows = {line[:22].strip(): line[22:].split() for line in lines[3:]}
    assert rows["parameters"] == ["30.26M", "10.33M", "0.341"]
    assert rows["experts E"] == ["16", "–"]


def test_a_search_prints_how_to_train_what_it_found(capsys):
    options = ["lm_small", "--budget", "active=20M,memory=4GB"]
    found = as_json(capsys, *options)
    assert found["budget"] == {"active": 20e6, "memory": 4e9} and found["name"] == "lm_small"
    lines = printed(capsys, *options).splitlines()
    assert max(map(len, lines[:-1])) <= 90
    sets = lines[-1].split("--set ")[1:]
    assert (
        load_config("lm_small", sets=[one.strip() for one in sets]).model.dim == found["pareto"][0]["set"]["model.dim"]
    )
    shown = [line for line in lines if "GiB" in line or "MiB" in line]
    assert len(shown) == min(24, len(found["pareto"]))
    assert shown[0].split()[0] == count(found["pareto"][0]["total"])
    assert shown[-1].split()[0] == count(found["pareto"][-1]["total"])


def test_the_vocabulary_of_a_tokenizer_that_is_there(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = BPETokenizer.train(["low lower lowest"] * 9, 260)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/tokenizer.json").write_text(tokenizer.to_json())
    assert as_json(capsys, "--set", "data.tokenizer=mine/tokenizer.json")["shape"]["vocab_size"] == 260
    assert as_json(capsys, "--set", "data.path=mine")["shape"]["vocab_size"] == 260  # as prepared text has one
    (tmp_path / "mine/config.json").write_text(load_config("lm_demo").model_dump_json())
    assert as_json(capsys, "mine/config.json")["shape"]["vocab_size"] == 260  # of a run
    assert as_json(capsys, "--set", "train.init_from=mine")["shape"]["vocab_size"] == 260
    assert as_json(capsys, "--set", "data.tokenizer=byte")["shape"]["vocab_size"] == 257
    search = ["lm_small", "--budget", "active=5M"]
    first = as_json(capsys, *search, "--set", "data.tokenizer=mine/tokenizer.json")["pareto"][0]
    assert first == as_json(capsys, *search, "--set", "data.vocab_size=260")["pareto"][0]


def test_a_plan_imports_neither_torch_nor_numpy():
    code = (
        "import sys; from himoe.cli import main; assert main(['plan', '--model', 'deepseek_v3']) == 0;"
        "assert not {'torch', 'numpy', 'tokenizers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("form", "number", "text"),
    [
        (count, 0, "0"),
        (count, 999, "999"),
        (count, 1000, "1.000K"),
        (count, 0.457303, "0.4573"),
        (count, 12.5, "12.5"),
        (count, 999_999, "1.000M"),
        (count, 46_702_792_704, "46.70B"),
        (count, 3e15, "3000T"),
        (size, 1023, "1023 B"),
        (size, 1024, "1.000 KiB"),
        (size, 24e9, "22.35 GiB"),
        (size, 1023.99 * 2**20, "1.000 GiB"),
        (work, 18_006_147_072_000.0, "18.01 TFLOP"),
        (work, 5e26, "500.0 YFLOP"),
    ],
)
def test_amounts(form, number, text):
    assert form(number) == text
