"""What happens between two steps: a log line, an evaluation, a checkpoint, a reason to stop.

In this order, so that every line of a step is written before the checkpoint that says the step is done, and that
checkpoint knows the evaluation of its own step.
"""

from collections.abc import Callable
from typing import Any

from himoe.run_folder import ALARM, FINISHED, INTERRUPTED, PRUNED, STOPPED_EARLY
from himoe.train.best import Best
from himoe.train.interrupt import StopRequest
from himoe.train.journal import Journal, describe_evaluation
from himoe.train.loop import Trainer
from himoe.train.progress import TrainingProgress

Prune = Callable[[int, dict[str, Any]], bool]
"""Asked with step and result after an evaluation whether the run ends here."""


def fit(
    trainer: Trainer,
    journal: Journal,
    progress: TrainingProgress,
    best: Best,
    *,
    steps: int,
    evaluate: Callable[[], dict[str, Any]],
    save: Callable[[], object],
    log_every: int,
    eval_every: int,
    checkpoint_every: int,
    keep_best: bool = True,
    early_stop: int | None = None,
    stop_on_alarm: bool = False,
    prune: Prune | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> str:
    """Train up to `steps`, or until something ends it earlier; the last step is always saved. Return the status.

    "finished"; "stopped early", after `early_stop` evaluations in a row without a new best one; "interrupted", by
    Ctrl-C or SIGTERM; "stopped by an alarm"; "pruned", where `prune` says so after an evaluation. The last step is
    evaluated like the others, since it may be the best, but without a line in the log: the caller writes one over all
    held-out text. `on_step` is called after every step.

    Raises DivergedError when loss or gradient are not finite.
    """
    saved, alarm, pruned = trainer.steps_done or None, False, False  # a resumed run stands at its checkpoint
    with StopRequest() as stop:
        while not (trainer.steps_done >= steps or best.ends_training(early_stop) or stop.requested or alarm or pruned):
            last, logged = trainer.steps_done + 1 == steps, (trainer.steps_done + 1) % log_every == 0
            trainer.step(measure=logged or last)
            on_step()
            step, improved = trainer.steps_done, False
            if logged or last:
                progress.show(journal.training_line())
                alarm = _report_alarms(journal, progress) and stop_on_alarm
            progress.advance(step)
            if step % eval_every == 0 or last:
                result = evaluate()
                improved = best.offer(step, result["bits_per_byte"]) and keep_best
                if not last:
                    journal.evaluation_line(result)
                    progress.say(f"step {step}: {describe_evaluation(result)}")
                    pruned = prune is not None and prune(step, result)
            ends = last or stop.requested or alarm or pruned or best.ends_training(early_stop)
            if step % checkpoint_every == 0 or improved or ends:
                save()
                saved = step
        if stop.requested and trainer.steps_done != saved:  # the signal came between two steps, or before the first
            save()
    if stop.requested:
        return INTERRUPTED
    if trainer.steps_done >= steps:
        return FINISHED
    if pruned:
        return PRUNED
    return ALARM if alarm else STOPPED_EARLY


def _report_alarms(journal: Journal, progress: TrainingProgress) -> bool:
    """Show the alarms of the last training line; return whether one of them is a reason to stop."""
    for alarm in journal.alarms:
        progress.say(f"alarm: {alarm.text}")
    return any(alarm.stops for alarm in journal.alarms)
