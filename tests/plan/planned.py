"""Configurations of every kind that a plan must know, small enough to run."""

from himoe.config import Config, load_config
from himoe.registry import EXPERTS, GATES, PRESETS, SELECTORS, having

POOLS = [
    {"num_experts": 4, "expert_dim": 24},
    {"num_experts": 8, "expert_dim": 12},
    {"num_experts": 4, "experts": "zero"},
]
VARIANTS: dict[str, dict] = {
    **{name: {"preset": name} for name in PRESETS},
    "expert_scale": {"preset": "hi_moe", "options": {"expert_scale": True}},
    "remoe_max_k": {"preset": "remoe", "options": {"max_k": 5}},
    "expert_choice_preset_max_k": {"preset": "expert_choice", "options": {"max_k": 5}},
    **{f"selector {name}": {"selector": name} for name in SELECTORS if name != "replay"},  # which needs a tensor
    **{f"{name}_max_k": {"selector": name, "selector_options": {"max_k": 3}}
       for name in having("selectors", "any_number")},
    **{f"gate {name}": {"selector": "top_k", "gate": name} for name in GATES},
    "noisy_with_load": {"selector": "top_k", "gate": "noisy", "balancers": [{"name": "load"}]},
    "cosine_narrow": {"selector": "top_k", "gate": "cosine", "gate_options": {"proj_dim": 3}},
    "per_group": {"preset": "moge", "groups": [[0, 1, 2], [3, 4, 5, 6, 7]], "top_k_per_group": [1, 2]},
    "one_group": {"preset": "switch", "num_groups": 1, "top_k": 1},
    **{f"{kind}_experts": {"preset": "switch", "experts": kind} for kind in EXPERTS},
    "shared": {"preset": "moge", "shared_dim": 20},
    "shared_gate": {"preset": "moge", "shared_dim": 20, "shared_gate": True, "experts": "gelu"},
    "shared_beside_constants": {"preset": "switch", "experts": "constant", "shared_dim": 20},
    "pools": {"preset": "switch", "pools": POOLS, "num_groups": 1, "top_k": 3},
    "router_per_pool": {"preset": "moge", "pools": POOLS, "groups": [[*range(4)], [*range(4, 12)], [*range(12, 16)]],
                        "top_k_per_group": [1, 2, 1]},
    "groups_across_pools": {"preset": "moge", "pools": POOLS, "num_groups": 2, "top_k": 4},
    "pool_of_constants": {"preset": "switch", "pools": [{"num_experts": 5}, {"num_experts": 3, "experts": "constant"}]},
    "capacity": {"preset": "switch", "capacity_factor": 1.25},
    "second_layer_only": {"preset": "switch", "every": 2},
    "named_layers": {"preset": "switch", "layers": [0]},
    "dense": {"every": 0},
}  # fmt: skip
MODELS: dict[str, dict] = {
    "untied": {"tie_embeddings": False},
    "no_qk_norm": {"qk_norm": False},
    "relu2_layers": {"ffn": "relu2"},
    "all_heads": {"num_heads": 4, "num_kv_heads": 4},
}


def planned(variant: str, *, model: dict | None = None, **train) -> Config:
    """Return the tiny recipe in one of the variants, with other keys of `model` and of `train`."""
    overrides = {"moe": {"allow_non_causal": True, "force": True, "expert_dim": 16, **VARIANTS.get(variant, {})}}
    sizes = {"dim": 32, "num_layers": 2, "ffn_dim": 40, **MODELS.get(variant, {}), **(model or {})}
    return load_config("lm_tiny", overrides={**overrides, "model": sizes, "train": train})
