"""The one typed tree of a run: data, model, mixture-of-experts layers, training.

`Config(...)`, `Config.model_validate` and `load_config` report all problems together, as one `ConfigError`.
"""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from himoe.config.kinds import STRICT
from himoe.config.moe_section import BalancerEntry, MoEConfig, PoolEntry, ScheduleEntry
from himoe.config.problems import Problem, config_error, translate
from himoe.config.rules import broken_rules, fill_in, flatten
from himoe.config.sections import DataConfig, ModelConfig, TrainConfig

__all__ = ["BalancerEntry", "Config", "DataConfig", "MoEConfig", "ModelConfig", "TrainConfig", "key_tree"]

# The keys of tables within a section, for messages; their lists are left out of the name.
INNER_KEYS = {
    "moe.pools": list(PoolEntry.model_fields),
    "moe.balancers.schedule": list(ScheduleEntry.model_fields),
}


class Config(BaseModel):
    """Everything that decides a run.

    >>> from himoe.config import load_config
    >>> load_config("lm_tiny", sets=["train.steps=5"]).train.steps
    5
    """

    model_config = STRICT

    name: str = Field(
        pattern=r"^[\w.-]+$",
        description="Name of the run, used for its folder. Default: the recipe's or the file's name",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Decides the initial weights, the training order and all noise"
    )
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig
    moe: MoEConfig
    train: TrainConfig

    @model_validator(mode="wrap")
    @classmethod
    def _report_all(cls, data: Any, handler: Any) -> Self:
        """Turn pydantic's report and every broken rule into one `ConfigError`."""
        try:
            config = handler(data)
        except ValidationError as error:
            problems = translate(error, key_tree(cls) | INNER_KEYS)
            raise config_error(problems + _rules_on_the_sound_part(data, problems)) from None
        problems = broken_rules(flatten(config.model_dump()))
        if problems:
            raise config_error(problems)
        return config

    @property
    def moe_layer_indices(self) -> list[int]:
        """Return the indices of the layers that have experts."""
        if self.moe.layers is not None:
            return sorted(self.moe.layers)
        every = self.moe.every
        return [index for index in range(self.model.num_layers) if every and (index + 1) % every == 0]


def key_tree(model: type[BaseModel]) -> dict[str, list[str]]:
    """Return the keys of every section, those of the top under the empty name."""
    sections = {key: field.annotation for key, field in model.model_fields.items()}
    tree = {"": list(sections)}
    for name, section in sections.items():
        if isinstance(section, type) and issubclass(section, BaseModel):
            tree[name] = list(section.model_fields)
    return tree


def _rules_on_the_sound_part(data: Any, problems: list[Problem]) -> list[Problem]:
    """Apply the rules whose keys have no problem of their own."""
    if not isinstance(data, Mapping):
        return []
    values: dict[str, Any] = {}
    for section, field in Config.model_fields.items():
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            continue
        given = data.get(section, {})
        given = given.model_dump() if isinstance(given, BaseModel) else given
        given = fill_in(given) if section == "moe" else given
        defaults = {
            key: leaf.get_default(call_default_factory=True)
            for key, leaf in field.annotation.model_fields.items()
            if not leaf.is_required()
        }
        if isinstance(given, Mapping):
            values |= flatten({section: defaults | dict(given)})
    unsound = {problem.leaf for problem in problems}
    return broken_rules({key: value for key, value in values.items() if key not in unsound})
