"""A small run of a few steps, and how tests read what it left."""

import io
import json

from rich.console import Console

from himoe import run
from himoe.config import load_config

SETS = ["train.threads=1", "train.steps=8", "train.checkpoint_every=4", "train.log_every=3", "train.eval_every=4"]
SETS += ["data.held_out=0.1", "data.eval_tokens=500", "train.batch_size=8", "train.seq_len=64"]
SETS += ["train.warmup_steps=2", "train.learning_rate=3e-3", "model.dim=32", "model.num_layers=2", "moe.top_k=4"]
SHORT = ["train.steps=1", "train.warmup_steps=0"]


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


TIMES = {"seconds", "tokens_per_second", "data_wait"}


def timeless(records):
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def weights(out, step=8):
    return (out / f"checkpoints/step-{step:08}/model.safetensors").read_bytes()


def state(out, step=8):
    """Return all that a checkpoint holds but its times, by file."""
    folder = out / f"checkpoints/step-{step:08}"
    kept = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    times = {"seconds", "step_seconds", "files"}
    return kept | {key: value for key, value in read(folder / "state.json").items() if key not in times}


def checkpoints(out):
    return sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").iterdir())
