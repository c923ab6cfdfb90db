"""A trained run in use: its model, and its score on text. The way of `himoe eval`, and of a run's own evaluations."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from himoe import run_folder
from himoe.build import build_groups, build_model
from himoe.config import Config
from himoe.data import Corpus, Tokenizer, load_tokenizer, prepare
from himoe.data.corpus import is_prepared
from himoe.data.preparation.prepare import find_source
from himoe.data.preparation.progress import preparing
from himoe.errors import ConfigError, DataError
from himoe.models import DecoderLM
from himoe.train.checkpoint import load_model_tensors, open_checkpoint
from himoe.train.environment import best_device
from himoe.train.evaluate import Reading, evaluate_domains, evaluate_pieces
from himoe.train.texts import Text, source_pieces, token_pieces
from himoe.train.usage import Usage


@dataclass(frozen=True)
class LoadedRun:
    """A trained model with what is needed to use it; `weights` says which it has: "averaged" or "trained"."""

    config: Config
    tokenizer: Tokenizer
    model: DecoderLM
    checkpoint: Path
    step: int
    weights: str


def load_run(run: Path, checkpoint: str | None = None, *, ema: bool = True) -> LoadedRun:
    """Load the model of a run folder, in eval mode. No random generator moves.

    One that is not causal is loaded with a warning, whoever allowed it: it has been trained.

    Args:
        run: the run folder.
        checkpoint: as for `open_checkpoint`: "last" or None, "best", or a step.
        ema: take the averaged weights (`train.ema_decay`) where the run has them.

    Raises RunFolderError or CheckpointError when something is missing, damaged or foreign.
    """
    config = Config.model_validate(run_folder.read_json(run / "config.json"))
    saved = open_checkpoint(run, checkpoint, average=ema)
    tokenizer = load_tokenizer(run / "tokenizer.json")
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # building seeds all of them
        allowed = config.model_copy(update={"moe": config.moe.model_copy(update={"allow_non_causal": True})})
        model = build_model(allowed, tokenizer.vocab_size)
    load_model_tensors(model, saved.averaged_model, saved.path)
    weights = "trained" if saved.average is None else "averaged"
    return LoadedRun(config, tokenizer, model.to(best_device()).eval(), saved.path, saved.state["step"], weights)


def evaluate(
    run: Path,
    *,
    data: Path | Mapping[str, Path] | None = None,
    text_column: str = "text",
    domain_column: str | None = None,
    checkpoint: str | None = None,
    ema: bool = True,
    seq_len: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Score a run's model on its own held-out text, or on all of another; return what docs/evaluation.md describes.

    Args:
        run: the run folder.
        data: text in any form that `himoe prepare` reads, or several such by domain, read as it is scored, however
            long; of a folder that `himoe prepare` wrote, the held-out part. None is the run's own held-out text.
        text_column: field or column of `data` that holds a document.
        domain_column: the one that names its domain; None: domains are files or folders.
        checkpoint: as for `load_run`.
        ema: as for `load_run`.
        seq_len: tokens per window; None is as in training.
        console: where notes go; standard error when None.

    Raises HimoeError for whatever a user can mend.
    """
    if seq_len is not None and seq_len < 1:
        raise ConfigError(f"--seq-len is {seq_len}; it must be at least 1")
    console = console or Console(stderr=True)
    loaded = load_run(run, checkpoint, ema=ema)
    texts, baselines, source = {}, {}, None
    if data is None:
        texts, baselines = _own_text(run, loaded, console)
    elif isinstance(data, Path) and is_prepared(data):
        texts = _prepared_text(run, loaded, data)
    else:
        path, several = (data, None) if isinstance(data, Path) else (None, data)
        source = find_source(path, several, text_column=text_column, domain_column=domain_column)
    reading = _reading(loaded.config, loaded.tokenizer, seq_len)
    with console.status("evaluating") as status:  # draws nothing where there is no terminal

        def progress(done: float) -> None:
            status.update(f"evaluating {done:.0%}")

        pieces = source_pieces(source, loaded.tokenizer, progress) if source else token_pieces(texts, progress)
        with threads(loaded.config):
            result = evaluate_pieces(loaded.model, pieces, reading, partial(_new_usage, loaded))
    domains = with_baselines(result.pop("domains"), baselines, texts)
    about = {"run": str(run), "checkpoint": loaded.checkpoint.name, "step": loaded.step, "weights": loaded.weights}
    return {**about, "seq_len": reading.seq_len, "domains": domains, **result}


def _own_text(run: Path, loaded: LoadedRun, console: Console) -> tuple[dict[str, Text], dict[str, Any]]:
    """Return the held-out text of a run, and its baselines; raises DataError when it has changed since."""
    env, config = run_folder.read_env(run), loaded.config
    if config.data.tokenizer not in ("bpe", "byte"):  # a file, which may be gone; the run has a copy
        own = config.data.model_copy(update={"tokenizer": str(run / "tokenizer.json")})
        config = config.model_copy(update={"data": own})
    corpus = load_corpus(config, console)
    if corpus.hash != env["data"].get("hash"):
        raise DataError(f"the text that {run} was trained on has changed since; name a text to score with --data")
    return held_out(corpus), env["baselines"]


def _prepared_text(run: Path, loaded: LoadedRun, data: Path) -> dict[str, Text]:
    """Return the held-out part of prepared text; raises DataError when another tokenizer prepared it."""
    corpus = prepare(data)
    if corpus.tokenizer.hash != loaded.tokenizer.hash:
        raise DataError(f"{data} was prepared with another tokenizer than that of {run}; give the text itself")
    return held_out(corpus)


def _new_usage(loaded: LoadedRun) -> Usage:
    return Usage(loaded.model.moe_layer_indices(), build_groups(loaded.config.moe), best_device())


def load_corpus(config: Config, console: Console) -> Corpus:
    """Prepare the text that `config` names, or find it in the cache."""
    data = config.data
    with preparing(console) as progress:
        return prepare(
            Path(data.path) if data.path else None,
            sources={name: Path(path) for name, path in data.sources.items()} if data.sources else None,
            text_column=data.text_column,
            domain_column=data.domain_column,
            tokenizer=data.tokenizer,
            vocab_size=data.vocab_size,
            held_out=data.held_out,  # no seed: runs of several seeds share their held-out text
            deduplicate=data.deduplicate,
            workers=data.workers,
            progress=progress,
        )


def held_out(corpus: Corpus) -> dict[str, Text]:
    """Return each domain's held-out text."""
    return {name: Text(stream, stream.num_bytes) for name, stream in corpus.held_out.items()}


def score(config: Config, model: nn.Module, tokenizer: Tokenizer, texts: Mapping[str, Text]) -> dict[str, Any]:
    """Evaluate every domain as `config` trains: its windows, borders, micro-batches and precision."""
    return evaluate_domains(model, texts, _reading(config, tokenizer))


def _reading(config: Config, tokenizer: Tokenizer, seq_len: int | None = None) -> Reading:
    settings = config.train
    micro_batch = settings.batch_size // settings.accumulate
    length = seq_len or settings.seq_len
    return Reading(
        tokenizer.end_of_document,
        seq_len=length,
        batch_size=max(1, micro_batch * settings.seq_len // length),
        precision=settings.precision,
        cross_documents=config.data.cross_documents,
        byte_lengths=tokenizer.byte_lengths,
    )


def with_baselines(
    domains: Mapping[str, Any], baselines: Mapping[str, Any], texts: Mapping[str, Text]
) -> dict[str, Any]:
    """Return the domains' records with the byte models' bits per byte, where those are known and of the same text.

    The byte models were scored on the whole of `texts`; a record of a part of it must not be compared with them.
    """
    whole = {name for name, record in domains.items() if name in texts and record["bytes"] == texts[name].num_bytes}
    return {name: {**record, **(baselines.get(name, {}) if name in whole else {})} for name, record in domains.items()}


@contextmanager
def threads(config: Config) -> Iterator[None]:
    """Give torch the number of threads that `config` asks for, if it does, for a while."""
    before = torch.get_num_threads()
    set_threads(config)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def set_threads(config: Config) -> None:
    """Give torch the number of threads that `config` asks for, if it does."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
