"""How fast text is prepared, against the `tokenizers` library encoding the same documents, and with how much memory.

    python -m himoe.data.preparation.bench PATH [--rounds 3] [--workers N] [--sample 16] [--vocab-size 4096]

Learns a BPE from the text, then in every round lets the library encode a sample of the documents as one batch, on all
its threads, with each of its two calls, before and after the whole of PATH is prepared with the same tokenizer, into a
folder that is deleted again; the better one of the two counts. Rates are MB of text per second of wall time and per
second of processor time, which other work on the machine disturbs less.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

from himoe.data.preparation.prepare import find_source
from himoe.data.tokenizer import BPETokenizer

CALLS = ("encode_batch", "encode_batch_fast")  # the second leaves out where in the text each token stands
WATCHED = 1.0  # seconds between two looks at memory, each of which reads all of /proc
PREPARE = """
import sys
from himoe.data import prepare
path, tokenizer, out, workers = sys.argv[1:]
prepare(path, tokenizer=tokenizer, out=out, workers=int(workers) or None)
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m himoe.data.preparation.bench", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("path", type=Path, help="text to prepare")
    parser.add_argument("--rounds", type=int, default=3, help="how often (default 3; medians are printed)")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one per core)")
    parser.add_argument("--sample", type=int, default=16, help="MB of text that the library encodes (default 16)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="of the BPE (default 4096)")
    given = parser.parse_args()
    texts = sample(given.path, given.sample * 10**6)
    tokenizer = BPETokenizer.train(texts[::8], given.vocab_size)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in (*CALLS, "preparation")}
    with tempfile.TemporaryDirectory(prefix="himoe-bench-") as folder:
        saved = Path(folder, "tokenizer.json")
        tokenizer.save(saved)
        for number in range(given.rounds):
            before = {name: encode(tokenizer, texts, name) for name in CALLS}
            prepared = prepare_in_process(given.path, saved, Path(folder, str(number)), given.workers)
            rounds["preparation"].append(prepared)
            for name in CALLS:
                after = encode(tokenizer, texts, name)
                rounds[name].append({kind: max(rate, after[kind]) for kind, rate in before[name].items()})
            print(f"round {number + 1}: { ({name: series[-1] for name, series in rounds.items()}) }", file=sys.stderr)
    print(json.dumps(summary(rounds), indent=1))


def sample(path: Path, size: int) -> list[str]:
    """Return documents of together about `size` bytes, from units spread over the whole text."""
    units = find_source(path).units
    chosen = units[:: max(1, len(units) // 8)]
    texts: list[str] = []
    for unit in chosen:
        left = size // len(chosen)
        for _, text in unit.documents():
            texts.append(text)
            left -= len(text.encode())
            if left <= 0:
                break
    return texts


def encode(tokenizer: BPETokenizer, texts: list[str], call: str) -> dict[str, float]:
    """Time one of the library's own batch calls, on all threads."""
    size = sum(len(text.encode()) for text in texts)
    before, began = _processor_seconds(resource.RUSAGE_SELF), time.perf_counter()
    getattr(tokenizer.model, call)(texts, add_special_tokens=False)
    wall = time.perf_counter() - began
    return _rates(size, wall, _processor_seconds(resource.RUSAGE_SELF) - before)


def prepare_in_process(path: Path, tokenizer: Path, out: Path, workers: int) -> dict[str, float]:
    """Time a preparation in a process of its own, and watch the memory of that and its workers."""
    before, began = _processor_seconds(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "HIMOE_CACHE": str(out) + "-cache"}
    child = subprocess.Popen([sys.executable, "-c", PREPARE, path, tokenizer, out, str(workers)], env=environment)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while child.poll() is None:
            peak = max(peak, sum(map(_resident, family(child.pid))))
            time.sleep(WATCHED)

    watcher = threading.Thread(target=watch)
    watcher.start()
    watcher.join()
    wall = time.perf_counter() - began
    if child.returncode:
        raise SystemExit(f"the preparation ended with status {child.returncode}")
    parts = json.loads((out / "corpus.json").read_text(encoding="utf-8"))["domains"].values()
    size = sum(part[side]["bytes"] for part in parts for side in ("train", "held_out"))
    rates = _rates(size, wall, _processor_seconds(resource.RUSAGE_CHILDREN) - before)
    return {**rates, "mb": round(size / 1e6, 1), "peak_memory_mb": round(peak / 1e6)}


def family(process: int) -> list[int]:
    """Return a process and all its descendants, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        children.setdefault(parent, []).append(int(entry.parent.name))
    found = [process]
    for one in found:
        found += children.get(one, [])
    return found


def summary(rounds: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the medians of each series, and the preparation's rates over those of the library's calls."""
    found = {
        name: {key: round(median(one[key] for one in series), 2) for key in series[0]}
        for name, series in rounds.items()
    }
    for name in CALLS:
        pairs = list(zip(rounds["preparation"], rounds[name], strict=True))
        for kind in ("wall", "processor"):
            ratios = [ours[f"mb_per_{kind}_s"] / theirs[f"mb_per_{kind}_s"] for ours, theirs in pairs]
            found["preparation"][f"{kind}_over_{name}"] = round(median(ratios), 3)
    return found


def _rates(size: int, wall: float, processor: float) -> dict[str, float]:
    return {"mb_per_wall_s": round(size / 1e6 / wall, 3), "mb_per_processor_s": round(size / 1e6 / processor, 3)}


def _processor_seconds(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def _resident(process: int) -> int:
    """Return a process's resident memory in bytes; pages shared with others count in full."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


if __name__ == "__main__":
    main()
