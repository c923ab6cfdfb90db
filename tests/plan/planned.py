"""Configurations of every kind that a plan must know, small enough to run."""

from himoe.config import Config, load_config

POOLS = [
    {"num_experts": 4, "expert_dim": 24},
    {"num_experts": 8, "expert_dim": 12},
    {"num_experts": 4, "experts": "zero"},
]
VARIANTS: dict[str, dict] = {
    **{name: {"preset": name} for name in (
        "hi_moe", "hi_moe_paper", "hi_moe_official", "moge", "switch", "loss_free", "deepseek_v3", "glm4_moe",
        "mixtral", "olmoe", "qwen3_moe", "st_moe", "switch_transformers", "remoe", "expert_choice",
    )},
    "expert_scale": {"preset": "hi_moe", "options": {"expert_scale": True}},
    "remoe_max_k": {"preset": "remoe", "options": {"max_k": 5}},
    "expert_choice_max_k": {"preset": "expert_choice", "options": {"max_k": 5}},
    **{name: {"selector": name} for name in (
        "top_k", "top_k_in_tiles",
        "top_k_per_group", "top_k_in_best_groups", "top_p", "threshold", "expert_choice", "sinkhorn", "hash",
        "round_robin",
    )},
    "top_p_max_k": {"selector": "top_p", "selector_options": {"max_k": 3}},
    "threshold_max_k": {"selector": "threshold", "selector_options": {"max_k": 3}},
    "noisy": {"selector": "top_k", "gate": "noisy", "balancers": [{"name": "load"}]},
    "cosine": {"selector": "top_k", "gate": "cosine"},
    "cosine_narrow": {"selector": "top_k", "gate": "cosine", "gate_options": {"proj_dim": 3}},
    "per_group": {"preset": "moge", "groups": [[0, 1, 2], [3, 4, 5, 6, 7]], "top_k_per_group": [1, 2]},
    "one_group": {"preset": "switch", "num_groups": 1, "top_k": 1},
    **{f"{kind}_experts": {"preset": "switch", "experts": kind} for kind in ("gelu", "relu", "relu2", "constant")},
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
