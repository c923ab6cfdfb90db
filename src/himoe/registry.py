"""The tables: short name → `"module:Class"`, nothing imported until it is used.

Every strategy is one line here, one file, one test. Wherever a name is accepted, so is a reader's own
`"package.module:Class"`. This file imports no torch, so names can be checked and listed at once; what a plan and the
rules of a configuration must know of a strategy stands in its line, as an `Entry` with facts.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, Unpack, cast

from himoe.errors import ConfigError, nearest


class Facts(TypedDict, total=False):
    """What is known of an entry without importing it.

    Attributes:
        by_group: selectors and presets take a fixed number of experts from each group; scores need such a selector.
        any_number: a token may have every expert, unless the option `max_k` says otherwise.
        mean_is_top_k: with any_number, a token has `top_k` on average, by construction or once its loss has acted, less
            what `max_k` cuts off.
        keep_groups: the option that limits a token to few groups, and its default as a divisor of their number; None
            for a default of all.
        goes_with: keys of `moe` beside it that it is made for, and a balancer.
        score: of a preset, where that is not softmax.
        bias_rate: how far a step moves the bias that it adds to the scores of the choice, by default.
        expert_scale: of a preset, whether it learns a factor for every expert by default.
        matrices: of experts, how many each has.
        learns_vector: of experts without matrices, whether each learns a vector all the same.
        gate_cost: of a gate, (E, D, its options) → multiply-adds of a token, and parameters; by default a matrix's.
    """

    by_group: bool
    any_number: bool
    mean_is_top_k: bool
    keep_groups: tuple[str, int | None]
    goes_with: Mapping[str, Any]
    score: str
    bias_rate: float
    expert_scale: bool
    matrices: int
    learns_vector: bool
    gate_cost: Callable[[int, int, Mapping[str, Any]], tuple[int, int]]


class Entry(str):
    """The place of an entry, `"module:Class"`, and its `facts`."""

    facts: Facts

    def __new__(cls, where: str, **facts: Unpack[Facts]) -> "Entry":  # noqa: D102
        assert facts.keys() <= Facts.__annotations__.keys(), facts
        entry = super().__new__(cls, where)
        entry.facts = cast(Facts, facts)
        return entry


BALANCERS: dict[str, str] = {
    "logit_correction": "himoe.balance.logit_correction:LogitCorrection",
    "two_level": "himoe.balance.two_level:TwoLevelTerms",
    "sequence": "himoe.balance.sequence:SequenceBalance",
    "switch": "himoe.balance.switch:Switch",
    "global_batch": "himoe.balance.global_batch:GlobalBatch",
    "importance": "himoe.balance.importance:Importance",
    "load": Entry("himoe.balance.load:Load", goes_with={"gate": "noisy"}),
    "phi": "himoe.balance.phi:Phi",
    "similarity": "himoe.balance.similarity:Similarity",
    "z_loss": "himoe.balance.z_loss:ZLoss",
    "local_entropy": "himoe.balance.local_entropy:LocalEntropy",
    "global_entropy": "himoe.balance.global_entropy:GlobalEntropy",
    "score_variance": "himoe.balance.score_variance:ScoreVariance",
    "loss_free": Entry("himoe.balance.loss_free:LossFree", bias_rate=1e-3),
    "momentum": Entry("himoe.balance.momentum:Momentum", bias_rate=5e-4),
    "quantile": "himoe.balance.quantile:Quantile",
    "expert_threshold": Entry("himoe.balance.expert_threshold:ExpertThreshold", goes_with={"selector": "threshold"}),
    "relu_sparsity": Entry(
        "himoe.balance.relu_sparsity:ReluSparsity", goes_with={"selector": "threshold", "score": "relu"}
    ),
}
GATES: dict[str, str] = {
    "linear": "himoe.nn.gate:Gate",
    "noisy": Entry("himoe.nn.noisy_gate:NoisyGate", gate_cost=lambda e, d, _: (2 * e * d, 2 * e * d)),
    "cosine": Entry(
        "himoe.nn.cosine_gate:CosineGate",
        gate_cost=lambda e, d, options: (
            (products := (options.get("proj_dim") or max(e // 2, 2)) * (d + e)),
            products + 1,
        ),
    ),
}
SELECTORS: dict[str, str] = {
    "top_k": "himoe.functional.selection.top_k:top_k",
    "top_k_per_group": Entry("himoe.functional.selection.top_k_per_group:top_k_per_group", by_group=True),
    "top_k_in_best_groups": Entry(
        "himoe.functional.selection.top_k_in_best_groups:top_k_in_best_groups", keep_groups=("keep", 2)
    ),
    "top_k_in_tiles": Entry(
        "himoe.functional.selection.top_k_in_tiles:top_k_in_tiles", any_number=True, mean_is_top_k=True
    ),
    "top_p": Entry("himoe.functional.selection.top_p:top_p", any_number=True),
    "threshold": Entry("himoe.functional.selection.threshold:threshold", any_number=True, mean_is_top_k=True),
    "expert_choice": Entry(
        "himoe.functional.selection.expert_choice:expert_choice", any_number=True, mean_is_top_k=True
    ),
    "expert_race": Entry(
        "himoe.functional.selection.expert_race:expert_race",
        any_number=True,
        mean_is_top_k=True,
        goes_with={"score": "sigmoid"},
    ),
    "sinkhorn": "himoe.functional.selection.sinkhorn:sinkhorn",
    "hash": "himoe.functional.selection.hash:hash_tokens",
    "round_robin": "himoe.functional.selection.round_robin:round_robin",
    "replay": "himoe.functional.selection.replay:replay",
}
SCORES: dict[str, str] = {
    "softmax": "himoe.functional.scores:softmax",
    "sigmoid": "himoe.functional.scores:sigmoid",
    "sqrt_softplus": "himoe.functional.scores:sqrt_softplus",
    "relu": Entry("himoe.functional.scores:relu", goes_with={"selector": "threshold", "balancer": "relu_sparsity"}),
    "softmax_over_selected": "himoe.functional.scores:softmax_over_selected",
    "softmax_per_group": Entry(
        "himoe.functional.scores:softmax_per_group", by_group=True, goes_with={"selector": "top_k_per_group"}
    ),
}
EXPERTS: dict[str, str] = {
    "swiglu": Entry("himoe.nn.experts:SwiGLUExperts", matrices=3),
    "gelu": Entry("himoe.nn.experts:GELUExperts", matrices=2),
    "relu": Entry("himoe.nn.experts:ReLUExperts", matrices=2),
    "relu2": Entry("himoe.nn.experts:ReLU2Experts", matrices=2),
    "zero": Entry("himoe.nn.free_experts:ZeroExperts", matrices=0),
    "copy": Entry("himoe.nn.free_experts:CopyExperts", matrices=0),
    "constant": Entry("himoe.nn.free_experts:ConstantExperts", matrices=0, learns_vector=True),
}
PRESETS: dict[str, str] = {
    "hi_moe": Entry("himoe.presets.hi_moe:hi_moe", by_group=True),
    "hi_moe_paper": Entry("himoe.presets.hi_moe_published:hi_moe_paper", by_group=True),
    "hi_moe_official": Entry("himoe.presets.hi_moe_published:hi_moe_official", by_group=True, expert_scale=True),
    "moge": Entry("himoe.presets.moge:moge", by_group=True),
    "switch": "himoe.presets.switch:switch",
    "loss_free": Entry("himoe.presets.loss_free:loss_free", score="sigmoid", bias_rate=1e-3),
    "deepseek_v3": Entry(
        "himoe.presets.deepseek_v3:deepseek_v3", score="sigmoid", bias_rate=1e-3, keep_groups=("keep_groups", 2)
    ),
    "glm4_moe": Entry(
        "himoe.presets.glm4_moe:glm4_moe", score="sigmoid", bias_rate=1e-3, keep_groups=("keep_groups", None)
    ),
    "mixtral": "himoe.presets.mixtral:mixtral",
    "olmoe": "himoe.presets.olmoe:olmoe",
    "qwen3_moe": "himoe.presets.qwen3_moe:qwen3_moe",
    "st_moe": "himoe.presets.st_moe:st_moe",
    "switch_transformers": "himoe.presets.switch_transformers:switch_transformers",
    "remoe": Entry("himoe.presets.remoe:remoe", score="relu", any_number=True, mean_is_top_k=True),
    "expert_choice": Entry("himoe.presets.expert_choice:expert_choice", any_number=True, mean_is_top_k=True),
}
TABLES: dict[str, dict[str, str]] = {
    "balancers": BALANCERS,
    "gates": GATES,
    "selectors": SELECTORS,
    "scores": SCORES,
    "experts": EXPERTS,
    "presets": PRESETS,
}


def fact(table: str, name: str | None, what: str, default: Any = None) -> Any:
    """Return what the line of `name` says, `default` for a reader's own, for none, and where the line does not say it.

    >>> fact("balancers", "momentum", "bias_rate"), fact("balancers", "my.module:Mine", "bias_rate")
    (0.0005, None)
    """
    assert what in Facts.__annotations__, what
    return getattr(TABLES[table].get(name or "", ""), "facts", {}).get(what, default)


def having(table: str, what: str) -> dict[str, Any]:
    """Return what the lines of a table say, by name, of the entries that say it.

    >>> sorted(having("scores", "by_group"))
    ['softmax_per_group']
    """
    found = {name: fact(table, name, what) for name in TABLES[table]}
    return {name: value for name, value in found.items() if value is not None}


GROUPED_SELECTORS, GROUPED_SCORES, GROUPED_PRESETS = (
    frozenset(having(table, "by_group")) for table in ("selectors", "scores", "presets")
)


def check_name(table: str, name: str) -> None:
    """Raise `ConfigError` unless `name` is in the table or has the form `"package.module:Class"`."""
    known = list(TABLES[table])
    if name not in known and ":" not in name:
        raise ConfigError(f"no entry {name!r} in {table}; known: {', '.join(known)}{nearest(name, known)}")


def load(table: str, name: str) -> Any:
    """Import and return the entry called `name`, from the table or from `"package.module:Class"`.

    >>> load("scores", "softmax").__name__
    'softmax'
    """
    check_name(table, name)
    module_name, _, attribute = TABLES[table].get(name, name).partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # the last two: a name such as ":x"
        found = "" if not isinstance(error, ModuleNotFoundError) else "; install it, or put its folder on PYTHONPATH"
        raise ConfigError(f"cannot load {name!r} for {table}: {error}{found}") from error
