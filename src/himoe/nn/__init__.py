"""The modules of one MoE layer, parameters and wiring only, and the three calls of a training loop."""

from himoe.nn.adapter import MoEAdapter, collect_routings
from himoe.nn.causality import non_causal_parts
from himoe.nn.cosine_gate import CosineGate
from himoe.nn.dense import GELUMLP, GatedNetwork, ReLU2MLP, ReLUMLP, SwiGLU
from himoe.nn.dispatch import Capacity, Dropless
from himoe.nn.experts import GELUExperts, ReLU2Experts, ReLUExperts, SwiGLUExperts
from himoe.nn.free_experts import ConstantExperts, CopyExperts, ZeroExperts
from himoe.nn.gate import Gate
from himoe.nn.hooks import aux_losses, observe, step
from himoe.nn.moe import MoE, moe_layers
from himoe.nn.noisy_gate import NoisyGate
from himoe.nn.pools import PooledExperts
from himoe.nn.router import Router

__all__ = [
    "GELUMLP",
    "Capacity",
    "ConstantExperts",
    "CopyExperts",
    "CosineGate",
    "Dropless",
    "GELUExperts",
    "Gate",
    "GatedNetwork",
    "MoE",
    "MoEAdapter",
    "NoisyGate",
    "PooledExperts",
    "ReLU2Experts",
    "ReLU2MLP",
    "ReLUExperts",
    "ReLUMLP",
    "Router",
    "SwiGLU",
    "SwiGLUExperts",
    "ZeroExperts",
    "aux_losses",
    "collect_routings",
    "moe_layers",
    "non_causal_parts",
    "observe",
    "step",
]
