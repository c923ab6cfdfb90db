"""A trained run in use: its model, and its score on text. The way of `himoe eval`, and of a run's own evaluations."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from himoe import run_folder
from himoe.build import build_model
from himoe.config import Config
from himoe.data import Corpus, Tokenizer, load_tokenizer, prepare
from himoe.data.sources import read_source
from himoe.errors import CheckpointError, DataError, RunFolderError
from himoe.models import DecoderLM
from himoe.train.checkpoint import list_checkpoints, load_checkpoint, load_model_tensors, newest_whole
from himoe.train.environment import best_device
from himoe.train.evaluate import Text, evaluate_domains
from himoe.train.progress import preparing


@dataclass(frozen=True)
class LoadedRun:
    """A trained model with what is needed to use it."""

    config: Config
    tokenizer: Tokenizer
    model: DecoderLM
    checkpoint: Path
    step: int


def load_run(run: Path, checkpoint: str | None = None) -> LoadedRun:
    """Load the model of a run folder, in eval mode.

    `checkpoint` is a name under `run/checkpoints`, such as "step-00000100"; None is the newest whole one. Raises
    RunFolderError or CheckpointError when something is missing, damaged or foreign.
    """
    config = Config.model_validate(run_folder.read_json(run / "config.json"))
    folder = run / run_folder.CHECKPOINTS
    if not (known := list_checkpoints(folder)):
        raise RunFolderError(f"{run} has no checkpoint yet; train on with --resume")
    path = folder / checkpoint if checkpoint else newest_whole(folder)[0]
    if path not in known:
        raise CheckpointError(f"{checkpoint} does not exist; there are {', '.join(one.name for one in known)}")
    saved = load_checkpoint(path)
    tokenizer = load_tokenizer(run / "tokenizer.json")
    model = build_model(config, tokenizer.vocab_size)
    load_model_tensors(model, saved.model, path)
    return LoadedRun(config, tokenizer, model.to(best_device()).eval(), path, saved.state["step"])


def evaluate(
    run: Path, *, data: Path | None = None, checkpoint: str | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Score a run's model on its own held-out text, or on all of another; return domains, loss and bits per byte.

    Args:
        run: the run folder.
        data: a text file or folder, split into domains as for training; None is the run's own held-out text.
        checkpoint: as for `load_run`.
        console: where notes go; standard error when None.
    """
    loaded = load_run(run, checkpoint)
    set_threads(loaded.config)
    baselines = {}
    if data is None:
        env = run_folder.read_env(run)
        corpus, baselines = load_corpus(loaded.config, console or Console(stderr=True)), env["baselines"]
        if corpus.hash != env["data"].get("hash"):
            raise DataError(f"the text that {run} was trained on has changed since; name a text to score with --data")
        texts = held_out(corpus)
    else:
        texts = {name: Text.encode(documents, loaded.tokenizer) for name, documents in read_source(data).load().items()}
    result = score(loaded.config, loaded.model, loaded.tokenizer, texts)
    domains = with_baselines(result.pop("domains"), baselines, texts)
    return {"run": str(run), "checkpoint": loaded.checkpoint.name, "step": loaded.step, "domains": domains, **result}


def load_corpus(config: Config, console: Console) -> Corpus:
    """Prepare the text that `config` names, or find it in the cache."""
    data = config.data
    with preparing(console) as progress:
        return prepare(
            Path(data.path) if data.path else None,
            tokenizer=data.tokenizer,
            vocab_size=data.vocab_size,
            held_out=data.held_out,  # no seed: runs of several seeds share their held-out text
            progress=progress,
        )


def held_out(corpus: Corpus) -> dict[str, Text]:
    """Return each domain's held-out text."""
    return {name: Text(file.tokens, file.num_bytes) for name, file in corpus.held_out.items()}


def score(config: Config, model: nn.Module, tokenizer: Tokenizer, texts: Mapping[str, Text]) -> dict[str, Any]:
    """Evaluate every domain as `config` trains: its windows, micro-batches and precision."""
    settings = config.train
    return evaluate_domains(
        model,
        texts,
        start_token=tokenizer.end_of_document,
        seq_len=settings.seq_len,
        batch_size=settings.batch_size // settings.accumulate,
        precision=settings.precision,
    )


def with_baselines(
    domains: Mapping[str, Any], baselines: Mapping[str, Any], texts: Mapping[str, Text]
) -> dict[str, Any]:
    """Return the domains' records with the byte models' bits per byte, where those are known and of the same text.

    The byte models were scored on the whole of `texts`; a record of a part of it must not be compared with them.
    """
    whole = {name for name, record in domains.items() if name in texts and record["bytes"] == texts[name].num_bytes}
    return {name: {**record, **(baselines.get(name, {}) if name in whole else {})} for name, record in domains.items()}


def set_threads(config: Config) -> None:
    """Give torch the number of threads that `config` asks for, if it does."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
