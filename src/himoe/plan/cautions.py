"""What is likely to go wrong with a plan, each in one line that names the numbers."""

from collections.abc import Iterator

from himoe.config import Config, TrainConfig
from himoe.plan.bias_step import step_faults
from himoe.plan.count import Parameters
from himoe.plan.memory import Ranks
from himoe.plan.of_config import router_name
from himoe.plan.routing import UNEVEN, expected_drop, tokens_per_expert
from himoe.plan.shape import Experts, Shape

SMALL_FFN = 0.1
"""Share of the active parameters: below it, experts can do little, whatever their number."""
FEW_TOKENS = 64
"""Of an expert in an optimizer step: fewer make a gradient of chance, in products that only wait for weights."""
WORTH_A_WORD = 0.01
"""Share of pairs without a place."""


def cautions(
    shape: Shape, counts: Parameters, train: TrainConfig, ranks: Ranks, config: Config | None
) -> Iterator[str]:
    """Yield a line for everything that is likely not meant."""
    feed_forward = sum(counts.active_by_role.get(role, 0) for role in ("experts", "shared_expert", "dense"))
    if feed_forward < SMALL_FFN * counts.active:
        embeddings = counts.active - counts.active_without_embeddings
        advice = "make them wider"
        if 2 * embeddings > counts.active:
            share = embeddings / counts.active
            advice = f"embeddings are {share:.0%}: use a smaller vocabulary, tie them, or widen the model"
        yield (
            f"feed-forward networks are {feed_forward / counts.active:.1%} of the active parameters, so that experts "
            f"change little; {advice}"
        )
    if shape.experts is None:
        return
    yield from _of_load(shape.experts, train)
    yield from _of_ranks(shape.experts, ranks)
    if config is not None:
        yield from step_faults(config.moe)
        yield from _of_drops(shape.experts, config, ranks)
        yield from _of_places(shape.experts, config)


def _of_load(experts: Experts, train: TrainConfig) -> Iterator[str]:
    tokens = min(tokens_per_expert(experts, train.batch_size * train.seq_len))
    if tokens < FEW_TOKENS:
        yield (
            f"an expert gets {tokens:.3g} tokens a step when all are used alike: too few for its gradient; raise "
            "train.batch_size, or have fewer experts"
        )


def _of_ranks(experts: Experts, ranks: Ranks) -> Iterator[str]:
    groups = len(experts.group_sizes)
    if ranks.ep > 1 and experts.group_top_k is not None and groups % ranks.ep:
        yield (
            f"--ep {ranks.ep} does not divide the {groups} groups: ranks hold parts of groups, so that choosing by "
            f"group does not give them equal work; use a divisor of {groups}"
        )
    elif ranks.ep > 1 and experts.group_top_k is not None and len(set(experts.group_sizes)) > 1:
        yield f"--ep {ranks.ep}: the groups are of unequal size, so that ranks do not get equal work"


def _of_drops(experts: Experts, config: Config, ranks: Ranks) -> Iterator[str]:
    factor = config.moe.capacity_factor
    if factor is None:
        return
    tokens = ranks.rows(config.train) * config.train.seq_len
    even, uneven = (expected_drop(experts, factor, tokens, cv=cv) for cv in (0.0, UNEVEN))
    if uneven > WORTH_A_WORD:
        yield (
            f"moe.capacity_factor = {factor:g} drops {even:.1%} of the pairs where experts are used alike, and "
            f"{uneven:.1%} where their load varies by {UNEVEN:.0%} (CV); raise it, or leave it out"
        )


def _of_places(experts: Experts, config: Config) -> Iterator[str]:
    name = router_name(config.moe)
    if experts.any_number and experts.mean_top_k < experts.top_k:
        yield (
            f"{name!r} gives a token {experts.mean_top_k} experts on average and up to {experts.top_k}: active "
            f"parameters and memory count {experts.top_k}, FLOPs {experts.mean_top_k}; max_k limits them, and "
            "lowers the average below this"
        )
    elif experts.any_number and experts.top_k > config.moe.top_k:
        yield f"{name!r} gives a token up to {experts.top_k} experts, and all of them are counted; max_k limits them"
    own = [part for part in (config.moe.preset, config.moe.selector, config.moe.gate) if part and ":" in part]
    if own:
        yield f"{', '.join(own)}: counted as a linear gate and moe.top_k = {experts.top_k} experts a token"
