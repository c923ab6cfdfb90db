"""Routers with a name: each function composes what one paper describes, in its coefficients, and returns a `Router`."""

from himoe.presets.deepseek_v3 import deepseek_v3
from himoe.presets.expert_choice import expert_choice
from himoe.presets.glm4_moe import glm4_moe
from himoe.presets.guards import check_guards
from himoe.presets.hi_moe import hi_moe
from himoe.presets.hi_moe_published import hi_moe_official, hi_moe_paper
from himoe.presets.loss_free import loss_free
from himoe.presets.mixtral import mixtral
from himoe.presets.moge import moge
from himoe.presets.olmoe import olmoe
from himoe.presets.qwen3_moe import qwen3_moe
from himoe.presets.remoe import remoe
from himoe.presets.st_moe import st_moe
from himoe.presets.switch import switch
from himoe.presets.switch_transformers import switch_transformers

__all__ = [
    "check_guards",
    "deepseek_v3",
    "expert_choice",
    "glm4_moe",
    "hi_moe",
    "hi_moe_official",
    "hi_moe_paper",
    "loss_free",
    "mixtral",
    "moge",
    "olmoe",
    "qwen3_moe",
    "remoe",
    "st_moe",
    "switch",
    "switch_transformers",
]
