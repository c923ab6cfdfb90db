"""The tables: short name → `"module:Class"`, nothing imported until it is used.

Every strategy is one line here, one file, one test. Wherever a name is accepted, so is a reader's own
`"package.module:Class"`. This file imports no torch, so names can be checked and listed at once.
"""

import importlib
from typing import Any

from himoe.errors import ConfigError, nearest

BALANCERS = {
    "logit_correction": "himoe.balance.logit_correction:LogitCorrection",
    "two_level": "himoe.balance.two_level:TwoLevelTerms",
    "sequence": "himoe.balance.sequence:SequenceBalance",
    "switch": "himoe.balance.switch:Switch",
    "global_batch": "himoe.balance.global_batch:GlobalBatch",
    "importance": "himoe.balance.importance:Importance",
    "load": "himoe.balance.load:Load",
    "phi": "himoe.balance.phi:Phi",
    "similarity": "himoe.balance.similarity:Similarity",
    "z_loss": "himoe.balance.z_loss:ZLoss",
    "local_entropy": "himoe.balance.local_entropy:LocalEntropy",
    "loss_free": "himoe.balance.loss_free:LossFree",
    "momentum": "himoe.balance.momentum:Momentum",
    "quantile": "himoe.balance.quantile:Quantile",
    "expert_threshold": "himoe.balance.expert_threshold:ExpertThreshold",
    "relu_sparsity": "himoe.balance.relu_sparsity:ReluSparsity",
}
GATES = {
    "linear": "himoe.nn.gate:Gate",
    "noisy": "himoe.nn.noisy_gate:NoisyGate",
    "cosine": "himoe.nn.cosine_gate:CosineGate",
}
SELECTORS = {
    "top_k": "himoe.functional.selection.top_k:top_k",
    "top_k_per_group": "himoe.functional.selection.top_k_per_group:top_k_per_group",
    "top_k_in_best_groups": "himoe.functional.selection.top_k_in_best_groups:top_k_in_best_groups",
    "top_k_in_tiles": "himoe.functional.selection.top_k_in_tiles:top_k_in_tiles",
    "top_p": "himoe.functional.selection.top_p:top_p",
    "threshold": "himoe.functional.selection.threshold:threshold",
    "expert_choice": "himoe.functional.selection.expert_choice:expert_choice",
    "sinkhorn": "himoe.functional.selection.sinkhorn:sinkhorn",
    "hash": "himoe.functional.selection.hash:hash_tokens",
    "round_robin": "himoe.functional.selection.round_robin:round_robin",
    "replay": "himoe.functional.selection.replay:replay",
}
GROUPED_SELECTORS = frozenset({"top_k_per_group"})  # that take equally many experts from each group
SCORES = {
    "softmax": "himoe.functional.scores:softmax",
    "sigmoid": "himoe.functional.scores:sigmoid",
    "sqrt_softplus": "himoe.functional.scores:sqrt_softplus",
    "relu": "himoe.functional.scores:relu",
    "softmax_over_selected": "himoe.functional.scores:softmax_over_selected",
    "softmax_per_group": "himoe.functional.scores:softmax_per_group",
}
GROUPED_SCORES = frozenset({"softmax_per_group"})  # that weigh each group by the experts taken from it
EXPERTS = {
    "swiglu": "himoe.nn.experts:SwiGLUExperts",
    "gelu": "himoe.nn.experts:GELUExperts",
    "relu": "himoe.nn.experts:ReLUExperts",
    "relu2": "himoe.nn.experts:ReLU2Experts",
    "zero": "himoe.nn.free_experts:ZeroExperts",
    "copy": "himoe.nn.free_experts:CopyExperts",
    "constant": "himoe.nn.free_experts:ConstantExperts",
}
PRESETS = {
    "hi_moe": "himoe.presets.hi_moe:hi_moe",
    "hi_moe_paper": "himoe.presets.hi_moe_published:hi_moe_paper",
    "hi_moe_official": "himoe.presets.hi_moe_published:hi_moe_official",
    "moge": "himoe.presets.moge:moge",
    "switch": "himoe.presets.switch:switch",
    "loss_free": "himoe.presets.loss_free:loss_free",
    "deepseek_v3": "himoe.presets.deepseek_v3:deepseek_v3",
    "glm4_moe": "himoe.presets.glm4_moe:glm4_moe",
    "mixtral": "himoe.presets.mixtral:mixtral",
    "olmoe": "himoe.presets.olmoe:olmoe",
    "qwen3_moe": "himoe.presets.qwen3_moe:qwen3_moe",
    "st_moe": "himoe.presets.st_moe:st_moe",
    "switch_transformers": "himoe.presets.switch_transformers:switch_transformers",
    "remoe": "himoe.presets.remoe:remoe",
    "expert_choice": "himoe.presets.expert_choice:expert_choice",
}
GROUPED_PRESETS = frozenset({"hi_moe", "hi_moe_paper", "hi_moe_official", "moge"})
GOES_WITH: dict[str, dict[str, dict[str, Any]]] = {
    "balancers": {
        "load": {"gate": "noisy"},
        "relu_sparsity": {"selector": "threshold", "score": "relu"},
        "expert_threshold": {"selector": "threshold"},
    },
    "scores": {
        "relu": {"selector": "threshold", "balancer": "relu_sparsity"},
        "softmax_per_group": {"selector": "top_k_per_group"},
    },
}
"""What an entry is made for, by its table and name: keys of `moe` beside it, and a balancer."""
TABLES = {
    "balancers": BALANCERS,
    "gates": GATES,
    "selectors": SELECTORS,
    "scores": SCORES,
    "experts": EXPERTS,
    "presets": PRESETS,
}


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
