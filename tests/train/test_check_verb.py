"""`himoe check causality` on runs: one that is causal, one that was allowed not to be, one of an earlier version."""

import json
import shutil
import warnings

import pytest
from run_case import SETS, SHORT, read

from himoe.cli import main
from himoe.trained import load_run

OFFICIAL = ["moe.preset=hi_moe_official", "moe.options={tau=0.5}", "moe.layers=[1]"]


def words(sets):
    return [word for value in sets for word in ("--set", value)]


@pytest.fixture(scope="module")
def allowed(text, tmp_path_factory):
    """A run of the authors' form of Hi-MoE, whose second layer alone has experts."""
    out = tmp_path_factory.mktemp("runs") / "allowed"
    sets = words([f"data.path={text}", *SETS, *SHORT, *OFFICIAL])
    assert main(["train", "lm_tiny", "--out", str(out), "--allow-non-causal", "--json", *sets]) == 0
    return out


def checked(capsys, out, *arguments, status):
    capsys.readouterr()
    assert main(["check", "causality", str(out), *arguments]) == status
    return capsys.readouterr()


def test_a_run_that_is_causal(capsys, finished):
    run = finished[0]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    found = json.loads(checked(capsys, run, "--json", "--length", "20", status=0).out)
    assert (found["check"], found["causal"], found["labelled"]) == ("causality", True, {})
    assert (found["run"], found["checkpoint"], found["step"]) == (str(run), "step-00000008", 8)
    assert (found["rows"], found["length"], found["tolerance"]) == (4, 20, 1e-11)
    assert [(one["mode"], one["cut"]) for one in found["suffixes"]] == [
        (mode, cut) for mode in ("training", "eval") for cut in (1, 5, 10, 15, 19)
    ]
    assert all(one["change"] <= 1e-11 < one["after"] and one["layer"] is None for one in found["suffixes"])
    text = checked(capsys, run, "--rows", "2", "--checkpoint", "step-00000004", status=0).out
    assert "step-00000004, 2 texts of 64 tokens" in text
    assert text.splitlines()[-1] == "causal: no later token changed an earlier logit."
    assert max(map(len, text.splitlines()[1:])) <= 80
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_was_allowed_not_to_be_causal(capsys, allowed):
    assert read(allowed / "config.json")["moe"]["allow_non_causal"] is True
    out, err = checked(capsys, allowed, "--json", status=1)
    found = json.loads(out)
    assert not found["causal"] and list(found["labelled"]) == ["LogitCorrection"]
    leaks = [one for one in found["suffixes"] if one["row"] is not None]
    assert {one["mode"] for one in leaks} == {"training"}
    assert all(one["layer"] == 1 and one["what"] in ("experts", "weights") for one in leaks)
    assert "himoe: warning: LogitCorrection (" in err
    text = checked(capsys, allowed, status=1).out
    end = " ".join(" ".join(text.splitlines()[-5:]).split())
    assert "LogitCorrection says it is not causal: the mean of the same batch holds later tokens" in end
    assert "not causal in training mode: tokens from 1 on change what is said at 0, first in layer 1, whose" in end
    assert max(map(len, text.splitlines()[1:])) <= 80


def test_the_same_texts_are_tried_with_the_same_seed(capsys, finished):
    one, same, other = (
        json.loads(checked(capsys, finished[0], "--json", "--seed", seed, status=0).out) for seed in ("1", "1", "2")
    )
    assert one == same != other


def test_a_run_without_experts_is_checked_too(capsys, text, tmp_path):
    sets = words([f"data.path={text}", *SETS, *SHORT, "moe.every=0"])
    assert main(["train", "lm_tiny", "--out", str(tmp_path / "dense"), "--json", *sets]) == 0
    assert json.loads(checked(capsys, tmp_path / "dense", "--json", status=0).out)["causal"]


def test_a_run_of_a_version_without_the_guard_is_loaded_and_resumed_only_where_allowed(capsys, allowed, tmp_path):
    old = shutil.copytree(allowed, tmp_path / "old")
    config = read(old / "config.json")
    config["moe"]["allow_non_causal"] = False
    (old / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load_run(old).model.moe_layer_indices() == [1]
    assert [warning for warning in caught if "LogitCorrection" in str(warning.message)]
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(old), "--set", "train.steps=1"]) == 2
    assert "--allow-non-causal" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(old), "--allow-non-causal"]) == 0
