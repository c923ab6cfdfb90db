"""What a run refuses, before anything is written."""

import pytest
from run_case import SHORT, config, train, weights

from himoe import run
from himoe.errors import ConfigError, DataError, RunFolderError
from himoe.run_folder import is_in_use, locked


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
