"""One run from beginning to end: load → build → fit → record. The one function behind `himoe train`.

Nothing is written before the configuration, the text and the model are known to be good. The run folder it fills is
described in docs/run-folder.md, training itself in docs/training.md.
"""

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from himoe import run_folder
from himoe.build import build_model
from himoe.config import Config
from himoe.data import Corpus, TrainingOrder, ngram_baselines
from himoe.errors import DataError, HimoeError
from himoe.functional.groups import Groups
from himoe.models import parameter_counts
from himoe.report import write_report
from himoe.train.checkpoint import newest_whole
from himoe.train.environment import best_device, describe_data, describe_environment, now
from himoe.train.fit import fit
from himoe.train.journal import Journal, describe_evaluation
from himoe.train.loop import Trainer
from himoe.train.optimizer import build_optimizer
from himoe.train.progress import TrainingProgress
from himoe.train.schedule import learning_rate_schedule
from himoe.train.snapshot import restore, rewind_logs, save
from himoe.train.statistics import Statistics
from himoe.trained import held_out, load_corpus, score, set_threads, with_baselines


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
    with ExitStack() as stack:
        if stands := out.is_dir():
            stack.enter_context(run_folder.locked(out))
        run_folder.check_run_folder(out, resume=resume, force=force)
        checkpoint = _newest_checkpoint(out, console) if resume else None
        set_threads(config)
        corpus = load_corpus(config, console)
        run = _Run(config, corpus, _build_trainer(config, corpus), out, console)
        if checkpoint:
            run.resume(checkpoint)
        env = run.environment(command, resume=resume)
        stack.enter_context(run_folder.readable_disk_errors(out))
        if not stands:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(run_folder.locked(out))
            run_folder.check_run_folder(out, force=force)  # again: another process may have been quicker
        if not resume:
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
            env = run_folder.read_env(self.out)
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
        if not self.trainer.steps_done:
            run_folder.write_text(self.out / "tokenizer.json", self.corpus.tokenizer.to_json())
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
        summary["domains"] = with_baselines(summary["domains"], env["baselines"], held_out(self.corpus))
        summary["parameters"] = env["parameters"]
        run_folder.write_json(self.out / "summary.json", summary)
        self._report()
        if not finished:
            _say(self.console, f"stopped and saved at step {summary['step']}; go on with --resume --out {self.out}")
        return summary

    def _fit(self, journal: Journal) -> bool:
        settings = self.config.train
        with TrainingProgress(self.console, steps=settings.steps, done=self.trainer.steps_done) as progress:
            return fit(
                self.trainer,
                journal,
                progress,
                steps=settings.steps,
                evaluate=lambda: self._evaluate(self.config.data.eval_tokens),
                save=lambda: self._save(journal.seconds),
                log_every=settings.log_every,
                eval_every=settings.eval_every,
                checkpoint_every=settings.checkpoint_every,
            )

    def _evaluate(self, num_tokens: int | None) -> dict[str, Any]:
        lengths, texts = self.corpus.tokenizer.byte_lengths, held_out(self.corpus)
        texts = {name: text.prefix(num_tokens, lengths) for name, text in texts.items()}
        return score(self.config, self.trainer.model, self.corpus.tokenizer, texts)

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


def _newest_checkpoint(out: Path, console: Console) -> Path | None:
    path, damage = newest_whole(out / run_folder.CHECKPOINTS)
    for line in damage:
        _say(console, f"{line}; going back to {path.name if path else 'the start'}")
    if path is None:
        _say(console, f"{out} has no checkpoint yet: starting at step 0")
    return path


def _build_trainer(config: Config, corpus: Corpus) -> Trainer:
    """Build order, model, optimizer and statistics; raises DataError for a text too short for one batch."""
    settings = config.train
    order = TrainingOrder(corpus.train.tokens, settings.seq_len, config.seed)
    if order.windows_per_epoch < settings.batch_size:
        raise DataError(
            f"the training text is too short for one batch: {corpus.train.num_tokens} tokens give "
            f"{order.windows_per_epoch} of its train.batch_size = {settings.batch_size} sequences of "
            f"train.seq_len = {settings.seq_len}; give more text or lower one of the two"
        )
    model = build_model(config, corpus.tokenizer.vocab_size).to(best_device())
    groups = Groups.of(config.moe.groups or config.moe.num_groups, config.moe.num_experts)
    return Trainer(
        model,
        order,
        optimizer=build_optimizer(
            model, settings.learning_rate, weight_decay=settings.weight_decay, betas=settings.betas
        ),
        learning_rate=learning_rate_schedule(
            settings.schedule,
            settings.learning_rate,
            steps=settings.steps,
            warmup_steps=settings.warmup_steps,
            min_ratio=settings.min_learning_rate_ratio,
            decay_fraction=settings.decay_fraction,
        ),
        statistics=Statistics(model.moe_layer_indices(), groups, device=best_device()),
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        grad_clip=settings.grad_clip,
        precision=settings.precision,
    )


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
