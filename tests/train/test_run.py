"""A whole run, and a trained one in use: what it writes, what it refuses, and that it survives being killed."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from himoe import run, trained
from himoe.config import load_config
from himoe.errors import CheckpointError, ConfigError, DataError, MissingExtraError, RunFolderError
from himoe.run_folder import is_in_use, locked, read_log
from himoe.train import fit
from himoe.train.snapshot import FREE_KEYS

PAGE = Path(__file__).parents[2] / "docs" / "run-folder.md"
SETS = ["train.threads=1", "train.steps=8", "train.checkpoint_every=4", "train.log_every=3", "train.eval_every=4"]
SETS += ["data.held_out=0.1", "data.eval_tokens=500", "train.batch_size=8", "train.seq_len=64"]
SETS += ["train.warmup_steps=2", "train.learning_rate=3e-3", "model.dim=32", "model.num_layers=2", "moe.top_k=4"]
SHORT = ["train.steps=1", "train.warmup_steps=0"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Two small domains, and a cache of prepared data that no other test sees."""
    folder = tmp_path_factory.mktemp("text")
    os.environ["HIMOE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    for domain, words in {"verse": "roses are red", "prose": "it was a dark night; it rained"}.items():
        (folder / domain).mkdir()
        for i in range(30):
            lines = "\n".join(f"{i * k} {words} {k % 7}" for k in range(30))
            (folder / domain / f"{i}.txt").write_text(lines)
    yield folder
    del os.environ["HIMOE_CACHE"]


def config(text, *sets):
    return load_config("lm_tiny", sets=[f"data.path={text}", *SETS, *sets])


def train(config, out, **options):
    console = Console(file=io.StringIO(), width=200)
    summary = run.train(config, out=out, console=console, **options)
    return summary, console.file.getvalue()


def read(path):
    return json.loads(path.read_text())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(records):
    return [{k: v for k, v in record.items() if k not in {"seconds", "tokens_per_second"}} for record in records]


def weights(out, step=8):
    return (out / f"checkpoints/step-{step:08}/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """One uninterrupted run, its summary and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, *train(config(text), out, command=["himoe", "train"])


def test_the_folder_holds_what_its_page_says(finished, text):
    out, summary, _ = finished
    documents = {"config.json", "env.json", "metrics.jsonl", "load.jsonl", "summary.json", "tokenizer.json"}
    assert {path.name for path in out.iterdir()} == documents | {"checkpoints", "report.html"}
    assert load_config(out / "config.json") == config(text)
    env = read(out / "env.json")
    assert env["command"] == ["himoe", "train"] and env["threads"] == 1
    assert set(env["data"]["domains"]) == set(env["baselines"]) == {"verse", "prose"}
    assert env["parameters"]["total"] > env["parameters"]["active"] > 0
    assert read(out / "summary.json") == summary
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step-00000004", "step-00000008"]


def page_section(title):
    """Return the keys in the tables and the JSON examples of a section of docs/run-folder.md."""
    section = PAGE.read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)
    examples = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", section, re.DOTALL)]
    return set(re.findall(r"`([\w.]+)`", " ".join(cells))), examples


def test_the_page_names_every_key_that_is_written(finished):
    out, summary, _ = finished
    env = read(out / "env.json")
    written = {f"data.{key}" for key in env["data"]} | set(env) - {"data"}
    assert page_section("env.json")[0] == written | {"resumed"}
    assert page_section("summary.json")[0] == set(summary)
    _, (train_example, eval_example) = page_section("metrics.jsonl")
    metrics = lines(out / "metrics.jsonl")
    assert train_example.keys() == metrics[0].keys()
    assert eval_example.keys() == metrics[-1].keys()
    assert eval_example["domains"]["code"].keys() == metrics[-1]["domains"]["verse"].keys()
    keys, (load_example,) = page_section("load.jsonl")
    load = lines(out / "load.jsonl")[0]
    assert load_example.keys() == load.keys()
    assert load_example["layers"][0].keys() == load["layers"][0].keys() == keys


def test_metrics_and_load_lines(finished):
    out, summary, _ = finished
    metrics = lines(out / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in metrics] == [
        ("train", 3), ("eval", 4), ("train", 6), ("train", 8), ("eval", 8),
    ]  # fmt: skip
    first = metrics[0]
    assert first["tokens"] == 3 * 8 * 64
    assert first["loss"] == pytest.approx(math.log(257), rel=0.1)
    load = lines(out / "load.jsonl")
    assert [line["step"] for line in load] == [3, 6, 8]
    for line, steps in zip(load, (3, 3, 2), strict=True):
        for layer in line["layers"]:
            assert sum(layer["load"]) == steps * 8 * 64 * 4  # every token has 4 experts
            assert layer["drop_rate"] == 0
    assert [layer["layer"] for layer in load[0]["layers"]] == [0, 1]
    assert summary["layers"][0].keys() == load[0]["layers"][0].keys() - {"load"}
    assert summary["max_vio_window"] == max(layer["max_vio_window"] for layer in summary["layers"])


def test_the_final_evaluation_reads_all_held_out_text(finished, text):
    out, summary, _ = finished
    sizes = read(out / "env.json")["data"]["domains"]
    for name, record in summary["domains"].items():
        assert record["bytes"] == sizes[name]["held_out_bytes"] and record["tokens"] == sizes[name]["held_out_tokens"]
        assert record["unigram"] > record["bigram"] > 0
        assert record["bits_per_byte"] == pytest.approx(
            record["loss"] * record["tokens"] / math.log(2) / record["bytes"]
        )
    periodic = lines(out / "metrics.jsonl")[1]
    assert {record["tokens"] for record in periodic["domains"].values()} == {500}


def test_progress_is_plain_lines_where_there_is_no_terminal(finished):
    printed = finished[2]
    assert "step 3/8 · loss" in printed and "tokens/s" in printed and "left" in printed
    assert "step 4: held-out bits per byte" in printed
    assert "\x1b" not in printed


def test_a_terminal_gets_a_bar(text, tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    run.train(config(text, "train.steps=2", "train.warmup_steps=0", "train.log_every=1"), out=tmp_path, console=console)
    printed = console.file.getvalue()
    assert "step 2/2" in printed and "MaxVio" in printed


def test_evaluating_and_logging_do_not_change_training(finished, text, tmp_path):
    train(config(text, "train.eval_every=1", "train.log_every=1", "train.checkpoint_every=1"), tmp_path / "run")
    assert weights(tmp_path / "run") == weights(finished[0])


def test_kill_9_and_resume_equal_the_uninterrupted_run(finished, text, tmp_path):
    out = tmp_path / "killed"
    code = f"""
import time
from pathlib import Path
from himoe import run, trained
from himoe.config import load_config
step = run.Trainer.step
run.Trainer.step = lambda self: time.sleep(60) if self.steps_done == 6 else step(self)
run.train(load_config("lm_tiny", sets={[f"data.path={text}", *SETS]!r}), out=Path({str(out)!r}))
"""
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(read_log(out / "load.jsonl")) < 2 and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.01)  # until step 6 is logged, two steps past the checkpoint: those lines must be cut off again
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert not (out / "summary.json").exists()
    _, printed = train(config(text), out, resume=True)
    assert "at step 4" in printed
    assert weights(out) == weights(finished[0])
    for name in ("metrics.jsonl", "load.jsonl"):
        assert timeless(lines(out / name)) == timeless(lines(finished[0] / name))
    assert read(out / "env.json")["resumed"][0]["step"] == 4


def interrupt_after(monkeypatch, number, step):
    """Send this process a signal in the middle of a step."""
    original = run.Trainer.step

    def interrupted(self):
        if self.steps_done == step - 1:
            signal.raise_signal(number)
        original(self)

    monkeypatch.setattr(run.Trainer, "step", interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_and_saves_it_and_the_run_goes_on_later(finished, text, tmp_path, monkeypatch, number):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, number, 2)
        summary, printed = train(config(text), out)
    assert (summary["status"], summary["step"]) == ("interrupted", 2)
    assert "--resume" in printed and (out / "checkpoints/step-00000002").is_dir()
    assert summary["domains"] == {} and summary["bits_per_byte"] is None
    summary, _ = train(config(text), out, resume=True)
    assert summary["status"] == "finished" and weights(out) == weights(finished[0])
    assert timeless(lines(out / "metrics.jsonl")) == timeless(lines(finished[0] / "metrics.jsonl"))


def test_a_part_of_the_text_is_not_compared_with_the_whole(text, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, signal.SIGINT, 5)
    summary, _ = train(config(text), tmp_path / "run")  # evaluated on the first 500 tokens at step 4
    assert {record["tokens"] for record in summary["domains"].values()} == {500}
    assert not any({"unigram", "bigram"} & record.keys() for record in summary["domains"].values())


def test_ctrl_c_before_the_first_step_saves_the_start(finished, text, tmp_path, monkeypatch):
    out, enter = tmp_path / "run", fit.StopRequest.__enter__

    def interrupted(self):
        entered = enter(self)
        signal.raise_signal(signal.SIGINT)
        return entered

    with monkeypatch.context() as patch:
        patch.setattr(fit.StopRequest, "__enter__", interrupted)
        summary, printed = train(config(text), out)
    assert (summary["status"], summary["step"]) == ("interrupted", 0)
    assert "stopped and saved at step 0" in printed and (out / "checkpoints/step-00000000").is_dir()
    train(config(text), out, resume=True)
    assert weights(out) == weights(finished[0])


def test_ctrl_c_between_two_steps_saves_the_one_before(text, tmp_path, monkeypatch):
    class Late(fit.StopRequest):
        """The signal comes after step 3 was found not to be one to save."""

        @property
        def requested(self):
            self.asked += 1
            return self.asked > 6  # twice a step

        @requested.setter
        def requested(self, value):
            self.asked = 0

    monkeypatch.setattr(fit, "StopRequest", Late)
    summary, _ = train(config(text), tmp_path / "run")
    assert (summary["status"], summary["step"]) == ("interrupted", 3)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000003"]


def test_a_second_ctrl_c_stops_at_once(text, tmp_path, monkeypatch):
    def twice(self):
        asked = signal.getsignal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        while signal.getsignal(signal.SIGINT) == asked:  # two signals before Python looks would count as one
            pass
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run.Trainer, "step", twice)
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits "ignore"
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config(text), tmp_path / "run")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_training_outside_the_main_thread(text, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(config(text, *SHORT), tmp_path / "run")))
    thread.start()
    thread.join()
    assert results[0][0]["status"] == "finished"


def test_a_finished_run_can_be_resumed_without_harm(finished, text):
    out, before, _ = finished
    content, logged = weights(out), timeless(lines(out / "metrics.jsonl"))
    summary, _ = train(config(text), out, resume=True)
    assert weights(out) == content and timeless(lines(out / "metrics.jsonl")) == logged
    assert summary["domains"] == before["domains"] and summary["layers"] == before["layers"]


def test_resuming_leaves_the_tokenizer_alone(text, tmp_path, monkeypatch):
    train(config(text, *SHORT), tmp_path)
    before = (tmp_path / "tokenizer.json").stat()
    train(config(text, *SHORT), tmp_path, resume=True)
    after = (tmp_path / "tokenizer.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_damaged_environment_is_one_line(text, tmp_path):
    train(config(text, *SHORT), tmp_path)
    env = read(tmp_path / "env.json")
    del env["baselines"]
    (tmp_path / "env.json").write_text(json.dumps(env))
    with pytest.raises(RunFolderError, match="holds no baselines"):
        train(config(text, *SHORT), tmp_path, resume=True)
    with pytest.raises(RunFolderError, match="holds no baselines"):
        trained.evaluate(tmp_path)


def test_resume_without_a_checkpoint_starts_anew(finished, text, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "metrics.jsonl").write_text('{"kind": "train", "step": 3}\n')
    _, printed = train(config(text), out, resume=True)
    assert "no checkpoint yet" in printed and weights(out) == weights(finished[0])
    assert timeless(lines(out / "metrics.jsonl")) == timeless(lines(finished[0] / "metrics.jsonl"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(finished, text, tmp_path):
    out = tmp_path / "run"
    train(config(text), out)
    os.truncate(out / "checkpoints/step-00000008/model.safetensors", 100)
    summary, printed = train(config(text), out, resume=True)
    assert "step-00000008 is damaged" in printed and "going back to step-00000004" in printed
    assert summary["status"] == "finished" and weights(out) == weights(finished[0])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ("train.learning_rate=1e-4", CheckpointError, r"train\.learning_rate was 0\.003, now 0\.0001"),
        ("model.dim=64", CheckpointError, r"model\.dim was 32, now 64"),
        ("data.held_out=0.2", CheckpointError, r"data\.held_out was 0\.1, now 0\.2"),
    ],
)
def test_another_configuration_cannot_resume_it(finished, text, change, error, words):
    before = {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")}
    with pytest.raises(error, match=words):
        train(config(text, change), finished[0], resume=True)
    assert {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")} == before


def test_other_text_cannot_resume_it(finished, tmp_path):
    (tmp_path / "other.txt").write_text("\n\n".join(f"other words {i}" * 20 for i in range(300)))
    with pytest.raises(CheckpointError, match="trained on other text"):
        train(config(tmp_path / "other.txt"), finished[0], resume=True)


def test_bad_input_leaves_no_folder(text, tmp_path):
    (tmp_path / "short.txt").write_text("too short\n\n" * 40)
    for path, sets, error in [
        (tmp_path / "missing", [], DataError),
        (tmp_path / "short.txt", [], DataError),
        (text, ["train.batch_size=4096"], DataError),
        (text, ["moe.options.no_such_option=1"], ConfigError),
    ]:
        with pytest.raises(error) as caught:
            train(config(path, *sets), tmp_path / "run")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()


def test_too_short_for_one_batch_says_what_to_do(text, tmp_path):
    with pytest.raises(DataError, match=r"too short for one batch.*train\.batch_size = 4096.*give more text"):
        train(config(text, "train.batch_size=4096"), tmp_path / "run")


def test_a_run_is_never_overwritten_without_force(finished, text, tmp_path):
    out = tmp_path / "run"
    train(config(text, *SHORT, "train.seq_len=32"), out)
    with pytest.raises(RunFolderError, match="--force"):
        train(config(text), out)
    train(config(text), out, force=True)
    assert weights(out) == weights(finished[0])
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step-00000004", "step-00000008"]


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"force": True}])
def test_two_processes_never_write_to_one_run(finished, text, how):
    out, before = finished[0], {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")}
    with locked(out), pytest.raises(RunFolderError, match="is in use by another process"):
        train(config(text), out, **how)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_of_two_processes_that_start_a_run_the_quicker_one_has_it(text, tmp_path, monkeypatch):
    out, load = tmp_path / "run", run.load_corpus

    def slow(*arguments):
        corpus = load(*arguments)
        out.mkdir()
        (out / "config.json").write_text("{}")
        return corpus

    monkeypatch.setattr(run, "load_corpus", slow)
    with pytest.raises(RunFolderError, match="already holds a run"):
        train(config(text), out)
    assert [path.name for path in out.iterdir()] == ["config.json"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_run_holds_its_folder_until_its_end(text, tmp_path, monkeypatch, exists):
    out, seen, report = tmp_path / "run", [], run.write_report
    monkeypatch.setattr(run, "write_report", lambda folder: seen.append(is_in_use(folder)) or report(folder))
    if exists:
        out.mkdir()
    train(config(text, *SHORT), out)
    assert seen == [True] and not is_in_use(out)


def test_a_full_disk_is_one_line_and_spares_the_last_checkpoint(finished, text, tmp_path, monkeypatch):
    out, original = tmp_path / "run", run.save

    def full(trainer, *args, **kwargs):
        if trainer.steps_done == 8:
            raise OSError(28, os.strerror(28), "model.safetensors")
        return original(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run, "save", full)
        with pytest.raises(RunFolderError, match="No space left on device") as error:
            train(config(text), out)
    assert "\n" not in str(error.value)
    train(config(text), out, resume=True)
    assert weights(out) == weights(finished[0])


@pytest.mark.parametrize("error", [MissingExtraError("plotly", "report"), RunFolderError("cannot write the report")])
def test_without_a_report_the_run_still_succeeds(text, tmp_path, monkeypatch, error):
    def fail(out):
        raise error

    monkeypatch.setattr(run, "write_report", fail)
    summary, printed = train(config(text, *SHORT), tmp_path / "run")
    assert summary["status"] == "finished"
    assert f"no report.html: {error}" in printed


def test_eval_repeats_the_final_evaluation(finished):
    out, summary, _ = finished
    result = trained.evaluate(out)
    assert result["domains"] == summary["domains"] and result["step"] == 8
    assert result["bits_per_byte"] == summary["bits_per_byte"]
    earlier = trained.evaluate(out, checkpoint="step-00000004")
    assert earlier["step"] == 4 and earlier["loss"] > result["loss"]


def test_eval_on_other_text_reads_all_of_it(finished, tmp_path):
    (tmp_path / "letters.txt").write_text("Grüße\n" * 50)
    result = trained.evaluate(finished[0], data=tmp_path / "letters.txt")
    record = result["domains"]["letters"]
    assert record["bytes"] == 50 * 8 and record["tokens"] > 400
    assert "bigram" not in record


def test_eval_of_an_unknown_checkpoint_names_it(finished, tmp_path):
    with pytest.raises(CheckpointError, match=r"^step-5 does not exist; there are step-00000004, step-00000008$"):
        trained.evaluate(finished[0], checkpoint="step-5")
    with pytest.raises(RunFolderError, match=r"holds no config\.json"):
        trained.evaluate(tmp_path)


def test_a_loaded_run_is_ready_to_use(finished):
    loaded = trained.load_run(finished[0])
    assert not loaded.model.training and loaded.step == 8
    ids = torch.tensor([loaded.tokenizer.encode("roses")])
    logits, routings = loaded.model(ids)
    assert logits.shape == (1, 5, loaded.tokenizer.vocab_size) and len(routings) == 2


def test_a_system_that_does_not_tell_its_memory_trains_too(text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    summary, _ = train(config(text, *SHORT), tmp_path / "run")
    assert summary["status"] == "finished" and summary["peak_memory_mib"] is None


def test_a_model_without_experts_trains_too(text, tmp_path):
    summary, _ = train(config(text, *SHORT, "moe.every=0"), tmp_path / "run")
    assert summary["layers"] == [] and summary["max_vio_window"] is None
    assert (tmp_path / "run/load.jsonl").read_text() == ""
    assert Path(tmp_path / "run/report.html").is_file()


def test_dropped_pairs_are_told(text, tmp_path):
    summary, _ = train(config(text, *SHORT, "moe.capacity_factor=0.5"), tmp_path / "run")
    (line,) = lines(tmp_path / "run/load.jsonl")
    for layer, final in zip(line["layers"], summary["layers"], strict=True):
        assert 0.5 <= layer["drop_rate"] == final["drop_rate"] < 1
        assert sum(layer["load"]) == pytest.approx((1 - layer["drop_rate"]) * 8 * 64 * 4)


def test_experts_in_some_layers_only(text, tmp_path):
    summary, _ = train(config(text, *SHORT, "moe.every=2"), tmp_path / "run")
    assert [layer["layer"] for layer in summary["layers"]] == [1]


def test_what_may_change_on_resume_are_keys_of_the_configuration(text):
    tree = config(text).model_dump()
    for key in FREE_KEYS - {"name"}:
        section, _, leaf = key.partition(".")
        assert leaf in tree[section], key
    assert {"name"} <= FREE_KEYS and "name" in tree
