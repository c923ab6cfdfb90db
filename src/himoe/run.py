"""One run from beginning to end: load → build → fit → record. The one function behind `himoe train`.

Nothing is written before the configuration, the text and the model are known to be good. The run folder it fills is
described in docs/run-folder.md, training itself in docs/training.md.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from himoe import run_folder
from himoe.build import build_model
from himoe.config import Config
from himoe.data import Corpus, Tokenizer, TrainingOrder, load_tokenizer, ngram_baselines, prepare
from himoe.data.sources import read_source
from himoe.errors import DataError, HimoeError, RunFolderError
from himoe.functional.groups import Groups
from himoe.models import DecoderLM, parameter_counts
from himoe.report import write_report
from himoe.train.checkpoint import load_checkpoint, load_model_tensors, newest_whole
from himoe.train.environment import best_device, describe_data, describe_environment, now
from himoe.train.evaluate import Text, evaluate_domains
from himoe.train.fit import Journal, describe_evaluation, fit
from himoe.train.loop import Trainer
from himoe.train.optimizer import build_optimizer
from himoe.train.progress import TrainingProgress, preparing
from himoe.train.resume import restore, rewind_logs, save
from himoe.train.schedule import learning_rate_schedule
from himoe.train.statistics import Statistics


def train(
    config: Config,
    *,
    out: Path,
    resume: bool = False,
    force: bool = False,
    command: list[str] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train as `config` says, fill the run folder `out`, and return what summary.json holds.

    Args:
        config: the resolved configuration.
        out: the run folder: new or empty, unless `resume` or `force` says otherwise.
        resume: go on at the newest whole checkpoint of `out`, or at the start when it has none yet.
        force: replace the run that stands in `out`.
        command: what was typed, for env.json.
        console: where progress goes; standard error when None.

    Raises HimoeError for whatever a user can mend. The status "interrupted" in the result means that Ctrl-C or SIGTERM
    ended the run at a checkpoint.
    """
    console = console or Console(stderr=True)
    run_folder.check_run_folder(out, resume=resume, force=force)
    checkpoint = _newest_checkpoint(out, console) if resume else None
    _set_threads(config)
    corpus = _load_corpus(config, console)
    run = _Run(config, corpus, _build_trainer(config, corpus), out, console)
    if checkpoint:
        run.resume(checkpoint)
    env = run.environment(command, resume=resume)
    with run_folder.readable_disk_errors(out):
        if not resume:
            out.mkdir(parents=True, exist_ok=True)
            run_folder.clear_run_folder(out)
        return run.go(env)


@dataclass
class _Run:
    """A run in progress: all is built, nothing is written yet."""

    config: Config
    corpus: Corpus
    trainer: Trainer
    out: Path
    console: Console
    seconds_before: float = 0.0

    def resume(self, checkpoint: Path) -> None:
        state = restore(self.trainer, checkpoint, **self._identity())
        self.seconds_before = state["seconds"]
        _say(self.console, f"resuming {self.out} at step {state['step']}")
        if state["threads"] != (threads := torch.get_num_threads()):
            _say(self.console, f"{state['threads']} threads until now, {threads} from here: rounding may differ")

    def environment(self, command: list[str] | None, *, resume: bool) -> dict[str, Any]:
        """Return env.json; a resumed run adds to the one that it has."""
        path = self.out / "env.json"
        if resume and path.exists():
            env = run_folder.read_json(path)
            restart = {"command": command, "started": now(), "step": self.trainer.steps_done}
            return {**env, "resumed": [*env.get("resumed", []), restart]}
        return {
            **describe_environment(command),
            "data": describe_data(self.corpus),
            "parameters": asdict(parameter_counts(self.trainer.model)),
            "baselines": ngram_baselines(self.corpus),
        }

    def go(self, env: dict[str, Any]) -> dict[str, Any]:
        run_folder.write_json(self.out / "config.json", self.config.model_dump(mode="json"))
        run_folder.write_json(self.out / "env.json", env)
        self.corpus.tokenizer.save(self.out / "tokenizer.json")
        rewind_logs(self.out, self.trainer.steps_done, self.config.train.steps)
        journal = Journal(self.out, self.trainer, seconds_before=self.seconds_before)
        try:
            finished = self._fit(journal)
            if finished:
                _say(self.console, "evaluating on all held-out text")
                journal.evaluation_line(result := self._evaluate(None))
                _say(self.console, f"step {self.trainer.steps_done}: {describe_evaluation(result)}")
        finally:
            journal.close()
        summary = journal.summary("finished" if finished else "interrupted")
        summary["domains"] = _with_baselines(summary["domains"], env["baselines"])
        summary["parameters"] = env["parameters"]
        run_folder.write_json(self.out / "summary.json", summary)
        self._report()
        if not finished:
            _say(self.console, f"stopped and saved at step {summary['step']}; go on with --resume --out {self.out}")
        return summary

    def _fit(self, journal: Journal) -> bool:
        how = self.config.train
        with TrainingProgress(self.console, steps=how.steps, done=self.trainer.steps_done) as progress:
            return fit(
                self.trainer,
                journal,
                progress,
                steps=how.steps,
                evaluate=lambda: self._evaluate(self.config.data.eval_tokens),
                save=lambda: self._save(journal.seconds),
                log_every=how.log_every,
                eval_every=how.eval_every,
                checkpoint_every=how.checkpoint_every,
            )

    def _evaluate(self, num_tokens: int | None) -> dict[str, Any]:
        lengths, texts = self.corpus.tokenizer.byte_lengths, _held_out(self.corpus)
        texts = {name: text.prefix(num_tokens, lengths) for name, text in texts.items()}
        return _score(self.config, self.trainer.model, self.corpus.tokenizer, texts)

    def _save(self, seconds: float) -> None:
        folder, keep = self.out / run_folder.CHECKPOINTS, self.config.train.keep_checkpoints
        save(self.trainer, folder, seconds=seconds, keep=keep, **self._identity())

    def _identity(self) -> dict[str, Any]:
        return {"config": self.config.model_dump(mode="json"), "data_hash": self.corpus.hash}

    def _report(self) -> None:
        try:
            write_report(self.out)
        except HimoeError as error:  # plotly is missing, or the disk is full: the run itself is complete
            _say(self.console, f"no report.html: {error}")


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
    path = folder / checkpoint if checkpoint else newest_whole(folder)[0]
    if path is None:
        raise RunFolderError(f"{run} has no checkpoint yet; train on with --resume")
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
    _set_threads(loaded.config)
    baselines = {}
    if data is None:
        env = run_folder.read_json(run / "env.json")
        corpus, baselines = _load_corpus(loaded.config, console or Console(stderr=True)), env["baselines"]
        if corpus.hash != env["data"]["hash"]:
            raise DataError(f"the text that {run} was trained on has changed since; name a text to score with --data")
        texts = _held_out(corpus)
    else:
        texts = {name: Text.encode(documents, loaded.tokenizer) for name, documents in read_source(data).load().items()}
    result = _score(loaded.config, loaded.model, loaded.tokenizer, texts)
    domains = _with_baselines(result.pop("domains"), baselines)
    return {"run": str(run), "checkpoint": loaded.checkpoint.name, "step": loaded.step, "domains": domains, **result}


def _newest_checkpoint(out: Path, console: Console) -> Path | None:
    path, damage = newest_whole(out / run_folder.CHECKPOINTS)
    for line in damage:
        _say(console, f"{line}; going back to {path.name if path else 'the start'}")
    if path is None:
        _say(console, f"{out} has no checkpoint yet: starting at step 0")
    return path


def _load_corpus(config: Config, console: Console) -> Corpus:
    data = config.data
    with preparing(console) as progress:
        return prepare(
            Path(data.path) if data.path else None,
            tokenizer=data.tokenizer,
            vocab_size=data.vocab_size,
            held_out=data.held_out,  # the split's own seed stays 0: runs of several seeds share their held-out text
            progress=progress,
        )


def _build_trainer(config: Config, corpus: Corpus) -> Trainer:
    """Build order, model, optimizer and statistics; raises DataError for a text too short for one batch."""
    how = config.train
    order = TrainingOrder(corpus.train.tokens, how.seq_len, config.seed)
    if order.windows_per_epoch < how.batch_size:
        raise DataError(
            f"the training text is too short for one batch: {corpus.train.num_tokens} tokens are "
            f"{order.windows_per_epoch} sequences of train.seq_len = {how.seq_len}, and train.batch_size = "
            f"{how.batch_size}; give more text or lower one of the two"
        )
    model = build_model(config, corpus.tokenizer.vocab_size).to(best_device())
    groups = Groups.of(config.moe.groups or config.moe.num_groups, config.moe.num_experts)
    return Trainer(
        model,
        order,
        optimizer=build_optimizer(model, how.learning_rate, weight_decay=how.weight_decay, betas=how.betas),
        learning_rate=learning_rate_schedule(
            how.schedule,
            how.learning_rate,
            steps=how.steps,
            warmup_steps=how.warmup_steps,
            min_ratio=how.min_learning_rate_ratio,
            decay_fraction=how.decay_fraction,
        ),
        statistics=Statistics(model.moe_layer_indices(), groups, device=best_device()),
        batch_size=how.batch_size,
        accumulate=how.accumulate,
        grad_clip=how.grad_clip,
        precision=how.precision,
    )


def _held_out(corpus: Corpus) -> dict[str, Text]:
    return {name: Text(file.tokens, file.num_bytes) for name, file in corpus.held_out.items()}


def _score(config: Config, model: nn.Module, tokenizer: Tokenizer, texts: Mapping[str, Text]) -> dict[str, Any]:
    how = config.train
    return evaluate_domains(
        model,
        texts,
        start_token=tokenizer.end_of_document,
        seq_len=how.seq_len,
        batch_size=how.batch_size // how.accumulate,
        precision=how.precision,
    )


def _with_baselines(domains: Mapping[str, Any], baselines: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {**record, **baselines.get(name, {})} for name, record in domains.items()}


def _set_threads(config: Config) -> None:
    if config.train.threads:
        torch.set_num_threads(config.train.threads)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
