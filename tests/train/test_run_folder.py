import json
from pathlib import Path

import pytest

from himoe import run_folder
from himoe.errors import RunFolderError
from himoe.files import write_json, write_text
from himoe.run_folder import (
    Log,
    check_run_folder,
    clear_partial_files,
    clear_run_folder,
    is_in_use,
    locked,
    read_env,
    read_json,
    read_log,
    readable_disk_errors,
    run_of,
    truncate_log,
)


def make_run(folder):
    (folder / "checkpoints/step-00000001").mkdir(parents=True)
    for name in (
        "config.json",
        "env.json",
        "metrics.jsonl",
        "load.jsonl",
        "summary.json",
        "tokenizer.json",
        "report.html",
    ):
        (folder / name).write_text("{}")
    return folder


def test_new_and_empty_folders_are_fine_and_stay_as_they_are(tmp_path):
    check_run_folder(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    check_run_folder(tmp_path)
    (tmp_path / "config.json.123.tmp").touch()  # what a process killed in its first moment leaves
    check_run_folder(tmp_path)


def test_what_killed_processes_were_writing_is_cleared_away_and_nothing_else(tmp_path):
    make_run(tmp_path)
    (tmp_path / "notes.1.tmp").touch()
    before = set(tmp_path.iterdir())
    for name in ("config.json.1.tmp", "metrics.jsonl.23.tmp", "report.html.4.tmp"):
        (tmp_path / name).touch()
    clear_partial_files(tmp_path)
    assert set(tmp_path.iterdir()) == before


def test_a_run_is_replaced_only_by_force(tmp_path):
    make_run(tmp_path)
    with pytest.raises(RunFolderError, match="already holds a run; continue it with --resume, replace it with --force"):
        check_run_folder(tmp_path)
    check_run_folder(tmp_path, force=True)
    check_run_folder(tmp_path, resume=True)


def test_a_folder_of_other_things_is_not_even_replaced_by_force(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(RunFolderError, match="not empty and not a run folder"):
        check_run_folder(tmp_path, force=True)


def test_a_file_is_no_folder_and_nothing_is_nothing_to_resume(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="is a file"):
        check_run_folder(tmp_path / "file")
    with pytest.raises(RunFolderError, match="holds no run to resume"):
        check_run_folder(tmp_path / "nowhere", resume=True)


def test_clearing_deletes_our_files_and_no_other(tmp_path):
    make_run(tmp_path)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "checkpoints/mine").mkdir()
    for name in ("profile/trace.json.gz", "tensorboard/events.out.tfevents.1.host"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    clear_run_folder(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "checkpoints",
        "checkpoints/mine",
        "notes.txt",
    ]


def test_a_checkpoint_belongs_to_its_run(tmp_path):
    make_run(tmp_path / "run")
    assert run_of(tmp_path / "run") == run_of(tmp_path / "run/checkpoints/step-00000004") == tmp_path / "run"
    with pytest.raises(RunFolderError, match=r"ran does not exist; did you mean '.*run'\?"):
        run_of(tmp_path / "ran/checkpoints/step-00000004")


def test_a_document_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"step": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert read_json(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_document_and_no_other_file(tmp_path):
    path = tmp_path / "report.html"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_one_process_at_a_time_holds_a_folder(tmp_path):
    with locked(tmp_path):
        assert is_in_use(tmp_path)
        with pytest.raises(RunFolderError, match=rf"^{tmp_path} is in use by another process"), locked(tmp_path):
            raise AssertionError("both hold it")
    assert not is_in_use(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_system_without_locks_goes_without(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "fcntl", None)
    with locked(tmp_path), locked(tmp_path):
        assert not is_in_use(tmp_path)


def test_damaged_lines_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n[1]\n"x"\n\xff\xfe\n{"kind": "eval"}\n{"step": "2"}\n{"step": 3}\n{"st')
    assert read_log(path) == [{"step": 1}, {"step": 3}]


@pytest.mark.parametrize("key", ["data", "parameters", "baselines"])
def test_an_environment_without_what_a_run_needs_is_named(tmp_path, key):
    whole = {"data": {}, "parameters": {}, "baselines": {}}
    write_json(tmp_path / "env.json", whole)
    assert read_env(tmp_path) == whole
    write_json(tmp_path / "env.json", {name: value for name, value in whole.items() if name != key})
    with pytest.raises(RunFolderError, match=rf"env\.json holds no {key}; restore it or start a new run"):
        read_env(tmp_path)


def test_lines_can_be_read_while_the_run_goes_on_and_a_torn_one_is_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = Log(path)
    for step in (1, 2, 3):
        log.append({"step": step})
    assert [line["step"] for line in read_log(path)] == [1, 2, 3]
    log.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    truncate_log(path, lambda line: line["step"] <= 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    again = Log(path)
    again.append({"step": 3})
    again.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_missing_or_damaged_document_is_named(tmp_path):
    with pytest.raises(RunFolderError, match=r"holds no env\.json, so it is no run folder"):
        read_json(tmp_path / "env.json")
    (tmp_path / "env.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"env\.json cannot be read as JSON"):
        read_json(tmp_path / "env.json")


def test_a_full_disk_is_one_line_that_says_what_to_do(tmp_path):
    with (
        pytest.raises(RunFolderError, match=r"No space left on device.*go on with --resume") as error,
        readable_disk_errors(tmp_path),
        Path("/dev/full").open("w") as file,
    ):
        file.write("x")
        file.flush()
    assert "\n" not in str(error.value)
