"""From a configuration to a model."""

from himoe.build.model import build_model, build_moe, check_model
from himoe.build.router import build_groups, build_router

__all__ = ["build_groups", "build_model", "build_moe", "build_router", "check_model"]
