"""Several processes: those that share the work, those that die, and those that want the same."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from corpus_case import contents

from himoe.data import prepare
from himoe.data.preparation import prepare as preparation
from himoe.data.preparation.bench import family
from himoe.data.preparation.pool import Pool
from himoe.data.text import read_source
from himoe.errors import DataError

# A preparation in small units by two processes; each reports its stages on stdout.
SCRIPT = """
import functools, sys
from himoe.data.preparation import prepare as preparation
from himoe.data.text import read_source
preparation.read_source = functools.partial(read_source, unit_size=20_000)
def report(stage, done, total):
    print(stage, done, total, flush=True)
preparation.prepare(sys.argv[1], held_out=0.2, tokenizer="byte", out=sys.argv[2], workers=2, progress=report)
print("finished", flush=True)
"""


def start(path, out):
    return subprocess.Popen([sys.executable, "-c", SCRIPT, path, out], stdout=subprocess.PIPE, text=True)


def undisturbed(path, out, monkeypatch):
    """Return the files of the same corpus, made at one go by one process."""
    monkeypatch.setattr(preparation, "read_source", partial(read_source, unit_size=20_000))
    return contents(prepare(path, held_out=0.2, tokenizer="byte", workers=1, out=out).folder)


@pytest.fixture
def big(tmp_path, text):
    """Four files of some 100 kB each, together some 20 units."""
    (tmp_path / "text" / "all").mkdir(parents=True)
    for i in range(4):
        (tmp_path / "text" / "all" / f"{i}.txt").write_text(text(100_000, seed=i), encoding="utf-8")
        os.utime(tmp_path / "text" / "all" / f"{i}.txt", (10**9, 10**9))
    return tmp_path / "text"


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_the_files_are_the_same_whatever_the_number_of_processes(two_domains, small_units, tokenizer, tmp_path):
    made = [
        prepare(two_domains, tokenizer=tokenizer, vocab_size=300, workers=workers, cache=tmp_path / str(workers))
        for workers in (1, 2, 3)
    ]
    assert contents(made[0].folder) == contents(made[1].folder) == contents(made[2].folder)
    assert made[0].hash == made[1].hash == made[2].hash


LOOK = """
import sys
def look(_number, _advance):
    print("a word that must not get among the answers")
    return sorted({"torch", "__mp_main__"} & set(sys.modules))
"""
UNGUARDED = """
from look_at import look
from himoe.data.preparation.pool import Pool
print("once")
with Pool(2) as pool:
    print(*pool.run(look, [(1,), (2,)], None))
"""


def test_workers_import_neither_torch_nor_the_script_that_started_them(tmp_path):
    (tmp_path / "look_at.py").write_text(LOOK, encoding="utf-8")
    (tmp_path / "script.py").write_text(UNGUARDED, encoding="utf-8")
    found = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, check=True)
    assert found.stdout == "once\n[] []\n"


def kill_when(process, line_is):
    """Kill a preparation, but not its workers, as soon as it says what `line_is` looks for."""
    for line in process.stdout:
        if line_is(line):
            workers = family(process.pid)[1:]
            process.kill()
            process.wait()
            return workers
    raise AssertionError("it ended first")


def test_killed_on_the_way_it_goes_on_and_its_workers_end(big, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for stage, share in (("reading", 0.3), ("writing tokens", 0.2), ("writing tokens", 0.6)):
        workers = kill_when(
            start(big, out),
            lambda line, stage=stage, share=share: (
                line.startswith(stage) and int(line.split()[-2]) > share * int(line.split()[-1]) > 0
            ),
        )
        assert len(workers) == 2
        deadline = time.monotonic() + 20
        while any(map(is_alive, workers)):
            assert time.monotonic() < deadline, "a worker outlives the process that it works for"
            time.sleep(0.02)
    assert not (out / "corpus.json").exists()
    done = len(list((out / "units").iterdir()))
    assert done > 0
    process = start(big, out)
    first = next(line for line in process.stdout if line.startswith("writing tokens"))
    assert int(first.split()[-2]) > 0
    assert process.wait() == 0
    assert contents(out) == undisturbed(big, tmp_path / "once", monkeypatch)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def die(number, advance):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fail(number, advance):
    raise DataError(f"number {number}") if number == 3 else OSError(28, "No space left on device", "file")


def echo(number, advance):
    advance(number)
    return number


def test_a_pool_gives_all_results_and_reports_on_the_way():
    told, lock = [], threading.Lock()

    def advance(size):
        with lock:
            told.append(size)

    with Pool(3) as pool:
        assert sorted(pool.run(echo, ((i,) for i in range(20)), advance)) == list(range(20))
        assert sorted(told) == list(range(20))
        assert list(pool.run(echo, [], advance)) == []


def test_a_worker_that_dies_is_noticed_and_named():
    with (
        Pool(2) as pool,
        pytest.raises(DataError, match=r"was killed by signal 9 \(short of memory\?\); start"),
    ):
        list(pool.run(die, ((i,) for i in range(5)), lambda size: None))


@pytest.mark.parametrize(("number", "kind"), [(3, DataError), (4, OSError)])
def test_what_a_worker_raises_is_raised_here(number, kind):
    with Pool(2) as pool, pytest.raises(kind, match="number 3" if number == 3 else "No space left on device: 'file'"):
        list(pool.run(fail, [(number,)], lambda size: None))


def test_of_two_processes_at_the_same_text_the_second_waits_and_takes_what_the_first_made(big, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    told = []
    with preparation._lock(out, lambda *line: told.append(line)):
        second = start(big, out)
        stages = []
        for line in second.stdout:
            stages.append(line)
            if line.startswith("waiting"):
                break
        assert stages[-1] == "waiting for another process that prepares the same text 0 0\n"
        time.sleep(0.2)
        assert second.poll() is None
        assert not (out / "preparation.json").exists()
    rest = second.stdout.read()
    assert second.wait() == 0
    assert "waiting" not in rest and rest.endswith("finished\n")
    assert told == []


def test_two_processes_at_once_end_with_one_corpus(big, tmp_path, monkeypatch):
    both = [start(big, tmp_path / "out") for _ in range(2)]
    told = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all(lines.endswith("finished\n") for lines in told)
    assert sum("writing tokens" in lines for lines in told) == 1
    assert contents(tmp_path / "out") == undisturbed(big, tmp_path / "once", monkeypatch)
