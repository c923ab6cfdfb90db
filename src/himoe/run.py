"""One run from beginning to end: load → build → fit → record. The one function behind `himoe train`.

Nothing is written before the configuration, the text and the model are known to be good. The run folder it fills is
described in docs/run-folder.md, training itself in docs/training.md.
"""

from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from himoe import run_folder
from himoe.config import Config
from himoe.data import Corpus, ngram_baselines
from himoe.errors import HimoeError
from himoe.files import write_json, write_text
from himoe.models import parameter_counts
from himoe.report import write_report
from himoe.train.alarms import diverged_in_evaluation
from himoe.train.best import Best
from himoe.train.checkpoint import newest_whole
from himoe.train.environment import describe_data, describe_environment, kernels, new_id, now
from himoe.train.fit import Prune, fit
from himoe.train.journal import Journal, describe_evaluation
from himoe.train.loop import DivergedError, Trainer
from himoe.train.lr_finder import RangeTest, find_learning_rate
from himoe.train.nonfinite import NonFiniteLossError
from himoe.train.profile import Profile
from himoe.train.progress import TrainingProgress
from himoe.train.snapshot import restore, rewind_logs, save
from himoe.train.start import WarmStart, build_trainer
from himoe.train.writers import RunIdentity, check_writers, open_writers
from himoe.trained import held_out, load_corpus, score, set_threads, with_baselines


def train(
    config: Config,
    *,
    out: Path,
    resume: bool = False,
    force: bool = False,
    profile: bool = False,
    command: list[str] | None = None,
    console: Console | None = None,
    held: bool = False,
    report: bool = True,
    prune: Prune | None = None,
) -> dict[str, Any]:
    """Train as `config` says, fill the run folder `out`, and return what summary.json holds.

    Args:
        config: the resolved configuration.
        out: the run folder: new or empty, unless `resume` or `force` says otherwise.
        resume: go on at the newest whole checkpoint of `out`, or at the start when it has none yet.
        force: replace the run that stands in `out`.
        profile: record a few steps in `out/profile`.
        command: what was typed, for env.json.
        console: where progress goes; standard error when None.
        held: the caller holds the lock of `out` (`run_folder.locked`).
        report: write report.html at the end.
        prune: asked with step and result after every evaluation during training whether the run ends here, saved.

    Raises HimoeError for whatever a user can mend. The status "interrupted" in the result means that Ctrl-C or SIGTERM
    ended the run at a checkpoint; docs/run-folder.md has the others.
    """
    console = console or Console(stderr=True)
    check_writers(config.train.log_to)
    with ExitStack() as stack:
        if (stands := out.is_dir()) and not held:
            stack.enter_context(run_folder.locked(out))
        run_folder.check_run_folder(out, resume=resume, force=force)
        checkpoint = _newest_checkpoint(out, console) if resume else None
        run = _prepare(config, out, console, new=checkpoint is None)
        if checkpoint:
            run.resume(checkpoint)
        env = run.environment(command, resume=checkpoint is not None)
        stack.enter_context(run_folder.readable_disk_errors(out))
        if not stands:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(run_folder.locked(out))
            run_folder.check_run_folder(out, force=force)  # again: another process may have been quicker
        run_folder.clear_partial_files(out)
        if not resume:
            run_folder.clear_run_folder(out)
        return run.go(env, profile=profile, report=report, prune=prune)


def range_test(config: Config, *, console: Console | None = None) -> RangeTest:
    """Train with a rising learning rate until it breaks, and say which rate to train with; writes no run folder."""
    run = _prepare(config, Path(), console or Console(stderr=True), new=True)
    return find_learning_rate(run.trainer)


def _prepare(config: Config, out: Path, console: Console, *, new: bool) -> "_Run":
    """Load and build; weights come from `train.init_from` only where the run is `new`."""
    set_threads(config)
    start = WarmStart.find(Path(config.train.init_from)) if config.train.init_from and new else None
    if start:
        config = start.with_tokenizer(config)
    corpus = load_corpus(config, console)
    return _Run(config, corpus, build_trainer(config, corpus, start), out, console, start)


@dataclass
class _Run:
    """A run in progress: all is built, nothing is written yet."""

    config: Config
    corpus: Corpus
    trainer: Trainer
    out: Path
    console: Console
    start: WarmStart | None
    seconds_before: float = 0.0
    best: Best = field(default_factory=Best)
    _scored: tuple[int, int | None, dict[str, Any]] | None = field(default=None, init=False)

    def resume(self, checkpoint: Path) -> None:
        """Go on at a checkpoint that `_newest_checkpoint` has found whole."""
        state = restore(self.trainer, checkpoint, **self._identity(), checked=True)
        self.seconds_before = state["seconds"]
        _say(self.console, f"resuming {self.out} at step {state['step']}")
        if state["threads"] != (threads := torch.get_num_threads()):
            _say(self.console, f"{state['threads']} threads until now, {threads} from here: rounding may differ")
        used = kernels(self.trainer.model, self.trainer.precision)
        if state.get("kernels", used) != used:
            before, now_ = (", ".join(names) or "none" for names in (state["kernels"], used))
            _say(self.console, f"expert kernels were {before}, are {now_} from here: rounding may differ")
        if state["config"]["data"]["eval_tokens"] == self.config.data.eval_tokens:
            self.best = Best.of(state.get("best"))
        else:
            _say(self.console, "data.eval_tokens has changed: looking for the best evaluation from here on")

    def environment(self, command: list[str] | None, *, resume: bool) -> dict[str, Any]:
        """Return env.json; a resumed run adds to the one that it has."""
        path, run_id = self.out / "env.json", new_id(self.config.name)
        if resume and path.exists():
            env = run_folder.read_env(self.out)
            restart = {"command": command, "started": now(), "step": self.trainer.steps_done}
            restart["kernels"] = kernels(self.trainer.model, self.trainer.precision)
            return {"id": run_id, **env, "resumed": [*env.get("resumed", []), restart]}
        return {
            "id": run_id,
            **describe_environment(command),
            "kernels": kernels(self.trainer.model, self.trainer.precision),
            "data": describe_data(self.corpus),
            **({"init_from": self.start.record()} if self.start else {}),
            "parameters": asdict(parameter_counts(self.trainer.model)),
            "baselines": ngram_baselines(self.corpus),
        }

    def go(self, env: dict[str, Any], *, profile: bool, report: bool, prune: Prune | None) -> dict[str, Any]:
        write_json(self.out / "config.json", self.config.model_dump(mode="json"))
        write_json(self.out / "env.json", env)
        if not self.trainer.steps_done:
            write_text(self.out / "tokenizer.json", self.corpus.tokenizer.to_json())
        rewind_logs(self.out, self.trainer.steps_done)
        journal = self._journal(env)
        try:
            status = self._fit(journal, profile=profile, prune=prune)
            if status in run_folder.COMPLETE:
                _say(self.console, "evaluating on all held-out text")
                result = self._evaluate(None)
                journal.evaluation_line({**result, "final": True})
                _say(self.console, f"step {self.trainer.steps_done}: {describe_evaluation(result)}")
        except DivergedError as error:
            journal.alarm_line(error.alarm)
            raise
        finally:
            journal.close()
        summary = {**journal.summary(status), "best": self.best.record()}
        summary["domains"] = with_baselines(summary["domains"], env["baselines"], held_out(self.corpus))
        summary["parameters"] = env["parameters"]
        write_json(self.out / "summary.json", summary)
        if report:
            self._report()
        if status not in run_folder.COMPLETE:
            _say(self.console, f"{status} and saved at step {summary['step']}; go on with --resume --out {self.out}")
        return summary

    def _journal(self, env: dict[str, Any]) -> Journal:
        config, step = self.config.model_dump(mode="json"), self.trainer.steps_done
        writers = None
        if names := self.config.train.log_to:
            identity = RunIdentity.of(self.out, config, env, step=step)
            writers = open_writers(names, identity, warn=lambda text: _say(self.console, f"warning: {text}"))
        return Journal(self.out, self.trainer, seconds_before=self.seconds_before, writers=writers)

    def _fit(self, journal: Journal, *, profile: bool, prune: Prune | None) -> str:
        settings = self.config.train
        with ExitStack() as stack:
            progress = TrainingProgress(self.console, steps=settings.steps, done=self.trainer.steps_done)
            stack.enter_context(progress)
            recording = stack.enter_context(Profile(self.out / "profile")) if profile else None
            status = fit(
                self.trainer,
                journal,
                progress,
                self.best,
                steps=settings.steps,
                evaluate=lambda: self._evaluate(self.config.data.eval_tokens),
                save=lambda: self._save(journal.seconds),
                log_every=settings.log_every,
                eval_every=settings.eval_every,
                checkpoint_every=settings.checkpoint_every,
                keep_best=settings.keep_best,
                early_stop=settings.early_stop,
                stop_on_alarm=settings.stop_on_alarm,
                prune=prune,
                on_step=(lambda: _show(recording.on_step(), progress)) if recording else lambda: None,
            )
        if recording and not recording.complete:
            _say(
                self.console, f"warning: no profile; it takes {recording.needs} steps in one go, this run ended before"
            )
        return status

    def _evaluate(self, num_tokens: int | None) -> dict[str, Any]:
        """Score the held-out text, or its first tokens, with the averaged weights where there are such.

        Raises DivergedError when the loss is not finite.
        """
        step, average = self.trainer.steps_done, self.trainer.ema
        if self._scored and self._scored[:2] == (step, num_tokens):
            return self._scored[2]
        lengths, texts = self.corpus.tokenizer.byte_lengths, held_out(self.corpus)
        texts = {name: text.prefix(num_tokens, lengths) for name, text in texts.items()}
        with average.in_place() if average else nullcontext():
            try:
                result = score(self.config, self.trainer.model, self.corpus.tokenizer, texts)
            except NonFiniteLossError as error:
                raise DivergedError(diverged_in_evaluation(step, error)) from error
        result |= {"weights": "averaged"} if average else {}
        self._scored = (step, num_tokens, result)
        return result

    def _save(self, seconds: float) -> None:
        settings = self.config.train
        save(
            self.trainer,
            self.out / run_folder.CHECKPOINTS,
            seconds=seconds,
            best=self.best,
            keep=settings.keep_checkpoints,
            keep_every=settings.keep_every,
            keep_best=settings.keep_best,
            **self._identity(),
        )

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


def _show(table: str | None, progress: TrainingProgress) -> None:
    if table:
        progress.say(table)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
