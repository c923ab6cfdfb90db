"""What happens between two steps: a log line, an evaluation, a checkpoint, a request to stop.

In this order, so that every line of a step is written before the checkpoint that says the step is done.
"""

from collections.abc import Callable
from typing import Any

from himoe.train.interrupt import StopRequest
from himoe.train.journal import Journal, describe_evaluation
from himoe.train.loop import Trainer
from himoe.train.progress import TrainingProgress


def fit(
    trainer: Trainer,
    journal: Journal,
    progress: TrainingProgress,
    *,
    steps: int,
    evaluate: Callable[[], dict[str, Any]],
    save: Callable[[], object],
    log_every: int,
    eval_every: int,
    checkpoint_every: int,
) -> bool:
    """Train up to `steps`; return False when Ctrl-C or SIGTERM ended it earlier. Either way the last step is saved.

    The last step is not evaluated here: the caller does it on all held-out text.
    """
    saved = None
    with StopRequest() as stop:
        while trainer.steps_done < steps and not stop.requested:
            trainer.step()
            step, last = trainer.steps_done, trainer.steps_done == steps
            if step % log_every == 0 or last:
                progress.show(journal.training_line())
            progress.advance(step)
            if step % eval_every == 0 and not last:
                result = evaluate()
                journal.evaluation_line(result)
                progress.say(f"step {step}: {describe_evaluation(result)}")
            if step % checkpoint_every == 0 or last or stop.requested:
                save()
                saved = step
        if stop.requested and trainer.steps_done != saved:  # the signal came between two steps, or before the first
            save()
    return not stop.requested
