"""What the keys of data and training must be to each other, as far as that is known before anything is read."""

from decimal import ROUND_FLOOR, Context, Decimal

from himoe.config.rulebook import Rulebook, multiple
from himoe.shares import domains_fault, sum_fault

rule = Rulebook()


@rule("data.sources", "data.path")
def _sources_or_path(sources: dict[str, str] | None, path: str | None) -> str | None:
    return f"cannot stand beside data.path ({path!r}); give one of the two" if sources and path is not None else None


@rule("data.domain_column", "data.sources")
def _each_source_is_one_domain(domain_column: str | None, sources: dict[str, str] | None) -> str | None:
    if domain_column is None or sources is None:
        return None
    return "cannot stand beside data.sources, each of which is one domain; leave it out, or give data.path"


@rule("data.domain_column", "data.text_column")
def _domain_is_not_the_text(domain_column: str | None, text_column: str) -> str | None:
    return f"is data.text_column ({text_column!r}) too" if domain_column == text_column else None


@rule("data.weights")
def _weights_are_shares(weights: dict[str, float] | None) -> str | None:
    return None if weights is None else sum_fault(weights)


@rule("data.weights", "data.sources")
def _weights_of_the_sources(weights: dict[str, float] | None, sources: dict[str, str] | None) -> str | None:
    return None if weights is None or sources is None else domains_fault(weights, sources)


@rule("train.batch_size", "train.accumulate")
def _micro_batches_are_equal(batch_size: int, accumulate: int) -> str | None:
    return multiple(batch_size, accumulate, "train.accumulate")


@rule("train.warmup_steps", "train.steps")
def _warmup_ends(warmup_steps: int, steps: int) -> str | None:
    return f"must be < train.steps ({steps})" if warmup_steps >= steps else None


@rule("train.decay_fraction", "train.schedule", "train.warmup_steps", "train.steps")
def _decay_follows_warmup(fraction: float, schedule: str, warmup_steps: int, steps: int) -> str | None:
    if schedule != "wsd" or warmup_steps >= steps or warmup_steps + fraction * steps <= steps:
        return None
    most = Context(prec=3, rounding=ROUND_FLOOR).divide(Decimal(steps - warmup_steps), Decimal(steps))
    return f"must be ≤ {float(most):.3g}: the warm-up takes {warmup_steps} of the {steps} steps"


@rule("train.keep_every", "train.checkpoint_every")
def _kept_checkpoints_are_made(keep_every: int | None, checkpoint_every: int) -> str | None:
    return None if keep_every is None else multiple(keep_every, checkpoint_every, "train.checkpoint_every")


@rule("train.early_stop", "train.steps", "train.eval_every")
def _early_stop_can_happen(early_stop: int | None, steps: int, eval_every: int) -> str | None:
    if early_stop is None or early_stop < (evaluations := steps // eval_every):
        return None
    return (
        f"would never act: there are {evaluations} evaluations (train.steps = {steps}, train.eval_every = "
        f"{eval_every}) and the first one is the best so far; lower one of the two"
    )


@rule("train.log_to")
def _writers_once(log_to: list[str]) -> str | None:
    return "names a writer twice" if len(set(log_to)) < len(log_to) else None
