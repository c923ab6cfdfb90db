"""Routers of the tiny recipe with other keys, and their parts."""

from himoe.build import build_router
from himoe.config import Config, load_config

DIM = 16


def config(**moe) -> Config:
    """The tiny recipe, 8 experts in 4 groups, top 4, with other `moe` keys."""
    return load_config("lm_tiny", overrides={"moe": moe})


def router(**moe):
    return build_router(config(**moe).moe, DIM)


def parts(built, kind: type) -> list:
    return [module for module in built.balancer.modules() if isinstance(module, kind)]
