"""What every verb shares: help, one clear line for bad input, exit codes."""

import errno
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import himoe
from himoe.cli import VERBS, main
from himoe.cli.bench import BENCH_VERBS
from himoe.cli.sweep import SWEEP_VERBS
from himoe.errors import HimoeWarning

WITHOUT_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] != "torch", "torch is imported"
sys.meta_path.insert(0, NoTorch())
from himoe.cli import main
for arguments, code in [
    (["plan"], 0), (["plan", "--model", "deepseek_v3"], 0), (["plan", "--budget", "active=5M"], 0),
    (["--help"], 0), (["train", "--help"], 0), (["list"], 0), (["list", "presets"], 0), (["--version"], 0),
    (["help", "eval"], 0),
    (["train", "--set", "moe.top_k=99"], 2), (["eval", "nowhere"], 2), (["trian"], 2), (["list", "lm_tiny"], 0),
    (["bench", "--help"], 0), (["bench", "layer", "--help"], 0), (["bench", "layer", "--shape", "e65"], 2),
    (["list", "two_levl"], 2), (["check", "causality", "nowhere"], 2),
]:
    assert main(arguments) == code, arguments
"""


def failure(capsys, *arguments):
    """Return the one line on stderr of a command that must fail with status 2 and print nothing else."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("himoe: ")
    assert err.count("\n") == 1
    return err.removeprefix("himoe: ").rstrip("\n")


def test_help_list_and_bad_input_answer_without_torch():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_argument_and_help_print_the_same_and_name_every_verb(capsys):
    assert main([]) == 0
    bare = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == bare
    assert all(f"\n  {verb} " in bare for verb in VERBS)
    assert max(map(len, bare.splitlines())) <= 80


@pytest.mark.parametrize("words", [["help", "eval"], ["--help", "eval"], ["--debug", "eval", "--help"]])
def test_help_of_a_verb_can_be_asked_for_either_way(capsys, words):
    assert main(["eval", "--help"]) == 0
    usual = capsys.readouterr().out
    assert main(words) == 0
    assert capsys.readouterr().out == usual


@pytest.mark.parametrize(
    "verb", [*VERBS, *(f"bench {verb}" for verb in BENCH_VERBS), *(f"sweep {verb}" for verb in SWEEP_VERBS)]
)
def test_help_of_a_verb_has_worked_examples_and_fits_80_columns(capsys, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*verb.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert text.count(f"\n  himoe {verb}") >= 2
    assert "None" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"himoe {himoe.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["trian"], "; did you mean 'train'?"),
        (["train", "--sett", "a=b"], "unknown option '--sett'; did you mean '--set'? (see himoe train --help)"),
        (["train", "--lr", "1"], "unknown option '--lr'; did you mean --set train.learning_rate=1? (see himoe train"),
        (["train", "--max-grad-norm=1"], "unknown option '--max-grad-norm=1'; did you mean --set train.grad_clip=1?"),
        (["train", "--train.lr", "1"], "train.lr = 1: unknown key; did you mean 'train.learning_rate'?"),
        (["train", "--zzz", "1"], "unknown option '--zzz' (see himoe train --help)"),
        (["train", "--seed", "x"], "--seed is 'x'; it must be a whole number (see himoe train --help)"),
        (["train", "--seed"], "--seed needs a value (see himoe train --help)"),
        (["prepare", "--held-out", "x"], "--held-out is 'x'; it must be a number (see himoe prepare --help)"),
        (["train", "--dryrun"], "unknown option '--dryrun'; did you mean '--dry-run'?"),
        (["list", "--jsn"], "unknown option '--jsn'; did you mean '--json'?"),
        (["help", "trian"], "; did you mean 'train'?"),
        (["train", "--steps", "5"], "unknown option '--steps'; did you mean --set train.steps=5? (see himoe train"),
        (["train", "--top-k=2", "lm_tiny"], "unknown option '--top-k=2'; did you mean --set moe.top_k=2? (see"),
        (["train", "--moe.top_k", "2"], "moe.top_k = 2: must be a multiple of moe.num_groups (4)"),
        (["train", "--steps", "--json"], "unknown option '--steps'; did you mean --set train.steps=VALUE? (see"),
        (["list", "--dim", "5"], "unknown option '--dim' (see himoe list --help)"),
        (["train", "a", "b"], "unexpected argument 'b' (see himoe train --help)"),
        (["train", "--out"], "--out needs a value"),
        (["train", "--set", "steps"], "--set steps: must look like key=value"),
        (["train", "lm_tny"], "no recipe 'lm_tny'; known: "),
        (["train", "texts"], "(a file of yours ends in .toml); texts is a folder: did you mean --data texts?"),
        (["train", "a.txt"], "(a file of yours ends in .toml); a.txt is a file: did you mean --data a.txt?"),
        (["train", "nowhere.toml"], "no configuration file nowhere.toml"),
        (["train", "--set", "moe.top_k=99"], "moe.top_k = 99: must be ≤ moe.num_experts (16)"),
        (["plan", "--model", "mixtral"], "no model 'mixtral'; known: mixtral_8x7b, "),
        (["plan", "--model", "mixtral"], "; did you mean 'mixtral_8x7b'?"),
        (["plan", "--model", "mixtral_8x7b", "--set", "moe.top_k=1"], "--set moe: a published model has sizes of its"),
        (["plan", "--granularity", "1/2"], "--sparsity and --granularity are for --model; in a configuration set moe"),
        (["plan", "--model", "sd_10m", "--granularity", "1/0"], "--granularity is '1/0'; it must be a number above 0"),
        (["plan", "--model", "sd_10m", "--sparsity", "1/2"], "lead to moe.num_experts = 0.5, which must be whole"),
        (["plan", "--model", "deepseek_v3", "--sparsity", "8.5"], "68 experts, 8 for each token, which do not divide"),
        (["plan", "--dp", "3"], "--dp 3: must divide train.batch_size (4)"),
        (["plan", "--dp", "4", "--ep", "3"], "--dp 4 --ep 3: both must be ≥ 1, and ep must divide dp"),
        (["plan", "--ep", "0"], "--dp 1 --ep 0: both must be ≥ 1"),
        (
            ["plan", "lm_tiny", "--train.batch-size=48", "--dp=48", "--ep=48"],
            "--ep 48: must divide the number of exper",
        ),
        (["plan", "--budget", "activ=5M"], "no limit 'activ'; known: active, total, memory, compute; did you mean 'ac"),
        (["plan", "--budget", "active=none"], "--budget active=none: must be a number above 0, such as 50M"),
        (["plan", "--budget", "active=1K"], "--budget active=1000: no shape fits; raise a limit, or change what the r"),
        (["plan", "--budget", "active=5M", "--model", "sd_10m"], "--budget searches around a recipe or a file"),
        (["plan", "--compare", "lm_tiny"], "--compare"),
        (["plan", "lm_tiny", "--compare", "lm_tiny", "lm_demo"], "--compare names both models itself; leave the reci"),
        (["plan", "--set", "data.tokenizer=nowhere.json"], "nowhere.json: cannot read the tokenizer"),
        (["plan", "--moe.experts", "mine:Experts"], "experts 'mine:Experts' are your own: what they cost"),
        (["plan", "nowhere/config.json"], "no configuration file nowhere/config.json"),
        (["eval"], "name a run folder"),
        (["report"], "name a run folder"),
        (["check", "causality"], "name a run folder"),
        (["check"], "name a check; known: causality"),
        (["check", "causalty", "."], "no check 'causalty'; known: causality; did you mean 'causality'?"),
        (["check", "causality", ".", "--length", "1"], "--rows is 4 and --length 1; they must be at least 1 and 2"),
        (["check", "causality", "nowhere"], "run folder nowhere does not exist"),
        (["eval", "nowhere"], "run folder nowhere does not exist"),
        (["report", "."], "run folder . holds no config.json, so it is no run folder"),
        (["list", "scors"], "no table and no entry 'scors'; tables: balancers, gates, selectors, scores, experts, pre"),
        (["list", "scors"], "; did you mean 'scores'?"),
        (["list", "two_levl"], "; did you mean 'balancers two_level'?"),
        (["list", "scors", "softmax"], "no table 'scors'; known: balancers, gates, "),
        (["list", "switch"], "switch stands in balancers and presets: himoe list balancers switch or himoe list pres"),
        (
            ["list", "scores", "switch"],
            "switch stands not in scores, but in balancers and presets: himoe list balancers",
        ),
        (["list", "scores", "hi_mo"], "; did you mean 'presets hi_moe'?"),
        (["list", "scores", "no.such:Thing"], "cannot load 'no.such:Thing' for scores: No module named"),
        (["list", "recipes", "no.such:Thing"], "no entry 'no.such:Thing' in recipes; known: "),
        (["list", "scores", "sofmax"], "no entry 'sofmax' in scores; known: softmax, sigmoid"),
        (["list", "scores", "sofmax"], "; did you mean 'softmax'?"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    Path("a.txt").touch()
    assert text in failure(capsys, *arguments)


@pytest.mark.parametrize("arguments", [["train", "lm_tny", "--debug"], ["--debug", "train", "lm_tny"]])
def test_debug_adds_the_traceback(capsys, arguments):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("himoe: no recipe 'lm_tny'")


@pytest.mark.parametrize(
    ("raised", "status", "text"),
    [
        (KeyboardInterrupt(), 130, "himoe: stopped\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x"),
            2,
            "himoe: no space left on the disk: runs/x; free",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "himoe: Permission denied: /x\n"),
        (MemoryError(), 2, "himoe: not enough memory for this model: make its sizes or train.seq_len smaller"),
        (RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB"), 2, "himoe: not enough memory for this model: "),
    ],
)
def test_what_the_system_raises_becomes_one_line(capsys, monkeypatch, raised, status, text):
    def fail(self, command):
        raise raised

    monkeypatch.setattr(VERBS["list"], "run", fail)
    assert main(["list"]) == status
    err = capsys.readouterr().err
    assert err.startswith(text)
    assert err.count("\n") == 1


@pytest.mark.parametrize("shape", [(2**20, 2**25), (2**31 - 1, 2**31 - 1)])
def test_a_model_beyond_all_memory_is_one_line(capsys, monkeypatch, shape):
    monkeypatch.setattr(VERBS["list"], "run", lambda self, command: torch.empty(shape))
    assert failure(capsys, "list").startswith("not enough memory for this model: ")


@pytest.mark.parametrize("fault", [AssertionError("broken invariant"), RuntimeError("shapes do not match")])
def test_a_fault_of_our_own_is_not_hidden(monkeypatch, fault):
    def fail(self, command):
        raise fault

    monkeypatch.setattr(VERBS["list"], "run", fail)
    with pytest.raises(type(fault), match=str(fault)):
        main(["list"])


def test_our_warnings_are_one_line_and_others_stay_as_they_are(capsys, monkeypatch):
    def warn(self, command):
        warnings.warn("λ_inter is above λ_intra", HimoeWarning, stacklevel=1)
        warnings.warn("somebody else's", UserWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(VERBS["list"], "run", warn)
    shown = warnings.showwarning
    with pytest.warns(UserWarning, match="somebody else's"):
        assert main(["list"]) == 0
    assert capsys.readouterr().err == "himoe: warning: λ_inter is above λ_intra\n"
    assert warnings.showwarning is shown  # a library that calls main() gets its own way back


def test_a_reader_that_stops_early_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "himoe", "list", "recipes", "lm_tiny"], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        (["--data.cross-documents"], "cross_documents", True),
        (["--data.cross_documents=true"], "cross_documents", True),
        (["--data.vocab-size", "300"], "vocab_size", 300),
        (["--data.text-column=body"], "text_column", "body"),
        (["--data.sources.my-web", "web"], "sources", {"my-web": "web"}),
        (["--data.sources.my-web=w=b", "--data.sources.an_other", "b"], "sources", {"my-web": "w=b", "an_other": "b"}),
        (
            ['--data.weights."example.com"=0.5', "--data.weights.a-b", "0.5"],
            "weights",
            {"example.com": 0.5, "a-b": 0.5},
        ),
        (["--data.weights.'a=b'", "1"], "weights", {"a=b": 1.0}),
    ],
)
def test_every_key_of_the_configuration_is_an_option_too(capsys, option, key, value):
    assert main(["train", "lm_tiny", *option, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"][key] == value


def test_the_options_of_a_preset_are_written_with_either_dash(capsys):
    assert main(["train", "lm_tiny", "--moe.options.lambda-inter", "0.04", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["moe"]["options"] == {"lambda_inter": 0.04}


def test_an_option_called_like_no_key_names_the_nearest_one(capsys):
    assert main(["train", "--data.cross-document", "--dry-run"]) == 2
    assert "did you mean 'cross_documents'" in capsys.readouterr().err
