"""The configuration of a run: one typed tree, loaded from recipe, file and command line. Imports no torch."""

from himoe.config.loading import load_config
from himoe.config.recipes import DEFAULT_RECIPE, recipe_description, recipe_names, recipe_text
from himoe.config.schema import BalancerEntry, Config, DataConfig, ModelConfig, MoEConfig, TrainConfig
from himoe.config.toml import format_document

__all__ = [
    "DEFAULT_RECIPE",
    "BalancerEntry",
    "Config",
    "DataConfig",
    "MoEConfig",
    "ModelConfig",
    "TrainConfig",
    "format_document",
    "load_config",
    "recipe_description",
    "recipe_names",
    "recipe_text",
]
