"""The modules of one MoE layer, parameters and wiring only, and the three calls of a training loop."""

from himoe.nn.adapter import MoEAdapter, collect_routings
from himoe.nn.cosine_gate import CosineGate
from himoe.nn.dispatch import Capacity, Dropless
from himoe.nn.experts import GELUMLP, GELUExperts, SwiGLU, SwiGLUExperts
from himoe.nn.gate import Gate
from himoe.nn.hooks import aux_losses, observe, step
from himoe.nn.moe import MoE, moe_layers
from himoe.nn.noisy_gate import NoisyGate
from himoe.nn.pools import GatedNetwork, PooledExperts
from himoe.nn.router import Router

__all__ = [
    "GELUMLP",
    "Capacity",
    "CosineGate",
    "Dropless",
    "GELUExperts",
    "Gate",
    "GatedNetwork",
    "MoE",
    "MoEAdapter",
    "NoisyGate",
    "PooledExperts",
    "Router",
    "SwiGLU",
    "SwiGLUExperts",
    "aux_losses",
    "collect_routings",
    "moe_layers",
    "observe",
    "step",
]
