"""Routers with a name: each function composes what one paper describes, in its coefficients, and returns a `Router`."""

from himoe.presets.deepseek_v3 import deepseek_v3
from himoe.presets.guards import check_guards
from himoe.presets.hi_moe import hi_moe, hi_moe_official, hi_moe_paper
from himoe.presets.loss_free import loss_free
from himoe.presets.moge import moge
from himoe.presets.switch import switch

__all__ = ["check_guards", "deepseek_v3", "hi_moe", "hi_moe_official", "hi_moe_paper", "loss_free", "moge", "switch"]
