"""The authors' numbers, value by value, and the command that replays them."""

import copy
import json
import runpy
import sys
from pathlib import Path

import pytest

from himoe.errors import DataError
from himoe.testing.golden import REPLAY, TOLERANCE, main, replay

FILE = Path(__file__).parent / "hi_moe_and_loss_free.json"
DOCUMENT = json.loads(FILE.read_text(encoding="utf-8"))
HI_MOE_FIELDS = [
    *("expert_ids", "weights_after_capacity", "kept", "capacity", "load_kept", "load_loss", "intra", "inter", "z"),
    *("total", "grad_gate", "grad_x_norm", "mean_logits"),
]
LOSS_FREE_FIELDS = ["expert_ids_sorted", "weights", "load", "bias_after"]


def one_case(kind: str) -> dict:
    """A small document: the first case of a kind."""
    return {"cases": [copy.deepcopy(next(case for case in DOCUMENT["cases"] if case["kind"] == kind))]}


def first_place(call: dict, field: str) -> tuple[list | dict, int | str]:
    """The container and key of a field's first number."""
    holder, key = call, field
    while isinstance(holder[key], list):
        holder, key = holder[key], 0
    return holder, key


def written(tmp_path: Path, document: object) -> str:
    path = tmp_path / "golden.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("index", range(len(DOCUMENT["cases"])))
def test_every_value_of_every_case_is_reproduced(index):
    case = DOCUMENT["cases"][index]
    result = replay({"cases": [case]})
    fields = HI_MOE_FIELDS if case["kind"] == "hi_moe" else LOSS_FREE_FIELDS
    fields = [f for f in fields if f != "mean_logits" or case["penalty"]]
    calls = len(case["calls"])
    assert {name: count for name, (_, count) in result.items()} == {f"{case['kind']}.{f}": calls for f in fields}
    assert {name: worst for name, (worst, _) in result.items() if not worst <= TOLERANCE} == {}


def test_the_file_covers_every_form():
    hi_moe = [case for case in DOCUMENT["cases"] if case["kind"] == "hi_moe"]
    assert {case["intra_mode"] for case in hi_moe} == {"global", "group_conditional"}
    assert {case["inter_mode"] for case in hi_moe} == {"dense_group_mass", "sparse_group_mass", "selected_l2"}
    assert {case["entropy"] for case in hi_moe} == {"l2", "shannon"}
    assert {call["mode"] for case in hi_moe for call in case["calls"]} == {"train", "eval"}
    assert any(not all(kept) for case in hi_moe for call in case["calls"] for kept in call["kept"])
    assert set(REPLAY) == {case["kind"] for case in DOCUMENT["cases"]}


@pytest.mark.parametrize(
    ("kind", "field"), [("hi_moe", f) for f in HI_MOE_FIELDS] + [("loss_free", f) for f in LOSS_FREE_FIELDS]
)
def test_one_perturbed_number_makes_the_command_fail(kind, field, tmp_path, capsys):
    document = one_case(kind)
    holder, key = first_place(document["cases"][0]["calls"][-1], field)
    holder[key] = holder[key] + 1e-3 if isinstance(holder[key], float) else 1 - holder[key]
    assert main([written(tmp_path, document)]) == 1
    failed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "✗" in line]
    assert failed == [f"{kind}.{field}"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_a_number_makes_the_command_fail(value, tmp_path):
    document = one_case("hi_moe")
    document["cases"][0]["calls"][0]["z"] = value
    assert main([written(tmp_path, document)]) == 1


def test_a_list_of_another_length_makes_the_command_fail(tmp_path):
    document = one_case("hi_moe")
    document["cases"][0]["calls"][0]["kept"].pop()
    assert main([written(tmp_path, document)]) == 1


def test_the_tolerance_decides(tmp_path):
    document = one_case("hi_moe")
    document["cases"][0]["calls"][0]["z"] += 1e-3
    path = written(tmp_path, document)
    assert main([path, "--tolerance", "1e-2"]) == 0
    assert main([path, "--tolerance", "1e-4"]) == 1


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_command_prints_a_line_per_field_and_succeeds(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["golden", str(FILE)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("himoe.testing.golden", run_name="__main__")
    captured = capsys.readouterr()
    assert end.value.code == 0 and captured.err == ""
    lines = captured.out.splitlines()
    assert len(lines) == len(HI_MOE_FIELDS) + len(LOSS_FREE_FIELDS) + 1
    assert lines[-1] == "17 fields, 0 above 1e-05"


def broken(**changes) -> dict:
    document = one_case("hi_moe")
    document["cases"][0] |= changes
    return document


@pytest.mark.parametrize(
    "document",
    [
        "",
        '{"cases"',
        "[" * 100_000,
        "null",
        "[]",
        "{}",
        {"cases": []},
        {"cases": [1]},
        {"cases": ["text"]},
        {"cases": [{"kind": "hi_moe"}]},
        broken(kind="sinkhorn"),
        broken(kind=[]),
        broken(calls=[]),
        broken(calls=[[]]),
        broken(num_experts=-3),
        broken(num_groups=3),
        broken(top_k_per_group=99),
        broken(width=0),
        broken(tokens="a"),
        broken(x_cos=[]),
        broken(gate_sin=[1, 2]),
        broken(capacity_factor=-1),
        broken(inter_mode="none"),
    ],
)
def test_a_file_of_another_form_ends_in_one_line_and_status_2(document, tmp_path, capsys):
    assert main([written(tmp_path, document)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("golden: ") and captured.err.count("\n") == 1


def test_a_missing_file_a_folder_and_binary_end_in_one_line_and_status_2(tmp_path, capsys):
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    for path in (tmp_path / "missing.json", tmp_path, binary):
        assert main([str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_replay_raises_a_data_error_for_an_unknown_kind():
    with pytest.raises(DataError, match="not a golden file of the known form: KeyError 'sinkhorn'"):
        replay(broken(kind="sinkhorn"))
