"""himoe: sparse Mixture-of-Experts for PyTorch.

The public names are imported on first use, so that `import himoe` and the command line answer at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "MoE": "himoe.nn",
    "MoEAdapter": "himoe.nn",
    "Router": "himoe.nn",
    "Gate": "himoe.nn",
    "SwiGLUExperts": "himoe.nn",
    "GELUExperts": "himoe.nn",
    "PooledExperts": "himoe.nn",
    "SwiGLU": "himoe.nn",
    "Dropless": "himoe.nn",
    "Capacity": "himoe.nn",
    "aux_losses": "himoe.nn",
    "observe": "himoe.nn",
    "step": "himoe.nn",
    "collect_routings": "himoe.nn",
    "moe_layers": "himoe.nn",
    "Balancer": "himoe.balance",
    "Chain": "himoe.balance",
    "Schedule": "himoe.balance",
    "DualAscent": "himoe.balance",
    "GlobalBatch": "himoe.balance",
    "Importance": "himoe.balance",
    "Load": "himoe.balance",
    "LogitCorrection": "himoe.balance",
    "ExpertThreshold": "himoe.balance",
    "LossFree": "himoe.balance",
    "Momentum": "himoe.balance",
    "Quantile": "himoe.balance",
    "ReluSparsity": "himoe.balance",
    "PerGroup": "himoe.balance",
    "Phi": "himoe.balance",
    "SequenceBalance": "himoe.balance",
    "Similarity": "himoe.balance",
    "Switch": "himoe.balance",
    "TwoLevelTerms": "himoe.balance",
    "ZLoss": "himoe.balance",
    "Routing": "himoe.types",
    "RouterContext": "himoe.types",
    "Groups": "himoe.functional.groups",
    "DecoderLM": "himoe.models",
    "generate": "himoe.models",
    "parameter_counts": "himoe.models",
    "load_run": "himoe.trained",
    "HimoeError": "himoe.errors",
    "HimoeWarning": "himoe.errors",
}

if TYPE_CHECKING:
    from himoe.balance import (
        Balancer,
        Chain,
        DualAscent,
        ExpertThreshold,
        GlobalBatch,
        Importance,
        Load,
        LogitCorrection,
        LossFree,
        Momentum,
        PerGroup,
        Phi,
        Quantile,
        ReluSparsity,
        Schedule,
        SequenceBalance,
        Similarity,
        Switch,
        TwoLevelTerms,
        ZLoss,
    )
    from himoe.errors import HimoeError, HimoeWarning
    from himoe.functional.groups import Groups
    from himoe.models import DecoderLM, generate, parameter_counts
    from himoe.nn import (
        Capacity,
        Dropless,
        Gate,
        GELUExperts,
        MoE,
        MoEAdapter,
        PooledExperts,
        Router,
        SwiGLU,
        SwiGLUExperts,
        aux_losses,
        collect_routings,
        moe_layers,
        observe,
        step,
    )
    from himoe.trained import load_run
    from himoe.types import RouterContext, Routing

__all__ = [
    "Balancer",
    "Capacity",
    "Chain",
    "DecoderLM",
    "Dropless",
    "DualAscent",
    "ExpertThreshold",
    "GELUExperts",
    "Gate",
    "GlobalBatch",
    "Groups",
    "HimoeError",
    "HimoeWarning",
    "Importance",
    "Load",
    "LogitCorrection",
    "LossFree",
    "MoE",
    "MoEAdapter",
    "Momentum",
    "PerGroup",
    "Phi",
    "PooledExperts",
    "Quantile",
    "ReluSparsity",
    "Router",
    "RouterContext",
    "Routing",
    "Schedule",
    "SequenceBalance",
    "Similarity",
    "SwiGLU",
    "SwiGLUExperts",
    "Switch",
    "TwoLevelTerms",
    "ZLoss",
    "__version__",
    "aux_losses",
    "collect_routings",
    "generate",
    "load_run",
    "moe_layers",
    "observe",
    "parameter_counts",
    "presets",
    "step",
]


def __getattr__(name: str) -> Any:
    if name == "presets":
        return importlib.import_module("himoe.presets")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'himoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
