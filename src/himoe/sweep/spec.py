"""What a sweep varies, as a TOML file says it: a recipe, keys set in all runs, axes, zipped axes, a family of sizes.

Every key is one of the configuration (docs/configuration.md), `seed`, or `recipe`. Keys may be quoted
(`"train.steps" = 200`) or not; several tables of `[[zip]]` multiply, the axes of one move together.
"""

import tomllib
from collections.abc import Mapping
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from himoe.config import DEFAULT_RECIPE, Config
from himoe.config.kinds import STRICT
from himoe.config.problems import OTHER_NAMES, config_error, translate
from himoe.config.schema import key_tree
from himoe.errors import ConfigError, HimoeError, nearest
from himoe.sweep.identity import VOLATILE

TOP = ("seed", "recipe")
"""Keys that lie in no section."""


def _ratio(value: float | str) -> str:
    """Return a number as the text of a fraction."""
    try:
        number = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        number = Fraction(-1)
    if number < 0:
        raise ValueError("must be a number ≥ 0, such as 4 or '1/8'")
    return str(number)


Ratio = Annotated[int | float | str, AfterValidator(_ratio)]


class Family(BaseModel):
    """Experts of several numbers and sizes, with as many active, or as many total parameters.

    `granularity` is g = F/(4·D), `sparsity` s = E/K, `shared` the g of the shared expert, `width` K·g + shared. A list
    of lists in `granularity` asks for pools of several sizes, an equal part of the width each.
    """

    model_config = STRICT

    keep: Literal["active", "total"] = "active"
    granularity: list[Ratio | list[Ratio]] | None = Field(default=None, min_length=1)
    sparsity: list[Ratio] | None = Field(default=None, min_length=1)
    shared: list[Ratio] | None = Field(default=None, min_length=1)
    width: Ratio | None = None


Values = Annotated[list[Any], Field(min_length=1)]


class Spec(BaseModel):
    """A sweep: `himoe.sweep.expand` makes its runs."""

    model_config = STRICT

    recipe: str = DEFAULT_RECIPE
    data: str | dict[str, str] | None = Field(default=None, min_length=1)
    set: dict[str, Any] = Field(default_factory=dict)
    axes: dict[str, Values] = Field(default_factory=dict)
    zip: list[dict[str, Values]] = Field(default_factory=list)
    family: Family | None = None

    @model_validator(mode="before")
    @classmethod
    def _dotted(cls, tree: Any) -> Any:
        """Write `[axes] moe.top_k = [1, 2]`, which TOML reads as a table in a table, as the dotted key that it is."""
        if not isinstance(tree, Mapping):
            return tree
        read = dict(tree)
        for name in ("set", "axes"):
            if isinstance(read.get(name), Mapping):
                read[name] = _flat(read[name])
        if isinstance(read.get("zip"), list):
            read["zip"] = [_flat(one) if isinstance(one, Mapping) else one for one in read["zip"]]
        return read

    @model_validator(mode="after")
    def _keys_are_known_and_said_once(self) -> "Spec":
        places: dict[str, str] = {}
        tables = [("[set]", self.set), ("[axes]", self.axes), *(("[[zip]]", one) for one in self.zip)]
        for place, table in tables:
            for key in table:
                _check_key(place, key, varied=place != "[set]")
                if key in places:
                    raise ConfigError(f"{place} {key} stands in {places[key]} too; say it once")
                places[key] = place
        for one in self.zip:
            lengths = {key: len(values) for key, values in one.items()}
            if len(set(lengths.values())) > 1:
                told = ", ".join(f"{key} has {number}" for key, number in lengths.items())
                raise ConfigError(f"[[zip]] axes move together and must be equally long: {told}")
        if self.family and (clash := [key for key in FAMILY_KEYS if key in places]):
            raise ConfigError(f"{places[clash[0]]} {clash[0]} is what [family] chooses; leave one of the two out")
        return self


FAMILY_KEYS = ("moe.num_experts", "moe.top_k", "moe.expert_dim", "moe.shared_dim", "moe.pools", "moe.top_k_per_group")


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the table with dotted keys down to the keys of the sections, whose values may be tables themselves."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}" if prefix else key
        inner = isinstance(value, Mapping) and "." not in name and name in key_tree(Config)
        flat |= _flat(value, f"{name}.") if inner else {name: value}
    return flat


def _check_key(place: str, key: str, *, varied: bool) -> None:
    """Refuse a key that no configuration has, or that changes no result."""
    tree = key_tree(Config)
    known = [f"{section}.{name}" for section, names in tree.items() if section for name in names]
    if key == "name" or (varied and key in VOLATILE):
        raise ConfigError(f"{place} {key} changes no result, so it tells no runs apart; leave it out")
    parts = key.split(".")
    if key in (*TOP, *known) or (len(parts) > 2 and ".".join(parts[:2]) in known):
        if key == "recipe" and not varied:
            raise ConfigError('[set] recipe: write recipe = "…" at the top of the file')
        return
    last = [name for name in known if name.endswith(f".{parts[-1]}")]
    meant = last[0] if len(last) == 1 else OTHER_NAMES.get(parts[-1])
    hint = f"; did you mean {meant!r}?" if meant else nearest(key, [*TOP, *known])
    if not hint and parts[0] in tree and parts[0]:
        hint = f"; known in {parts[0]}: {', '.join(tree[parts[0]])}"
    sections = ", ".join(filter(None, tree))
    raise ConfigError(f"{place} {key}: unknown key{hint or f'; keys begin with {sections}'}")


def load_spec(source: "Spec | Mapping[str, Any] | str | Path") -> Spec:
    """Return a spec: as it is, from a tree, from a TOML file, or a shipped one by its name.

    Raises ConfigError, in one line that names the key, for what cannot be a sweep.
    """
    if isinstance(source, Spec):
        return source
    if isinstance(source, Mapping):
        return _validated(dict(source), "sweep")
    path = Path(source)
    if path.suffix != ".toml":
        return _validated(tomllib.loads(shipped_text(str(source))), str(source))
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        siblings = [entry.name for entry in path.parent.glob("*.toml")]
        raise ConfigError(f"no sweep file {path}{nearest(path.name, siblings)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    return _validated(tree, str(path))


def _validated(tree: dict[str, Any], where: str) -> Spec:
    keys = {"": list(Spec.model_fields), "family": list(Family.model_fields)}
    try:
        return Spec.model_validate(tree)
    except ValidationError as error:
        problems = translate(error, keys)
        raise ConfigError(f"{where}: {one_line(config_error(problems[:1]))}") from None
    except HimoeError as error:
        raise ConfigError(f"{where}: {error}") from None


def one_line(error: HimoeError) -> str:
    """Return an error's text in one line."""
    return "; ".join(line.strip() for line in str(error).splitlines()).replace(":; ", ": ")


def shipped_names() -> list[str]:
    """Return the names of the sweeps that come with the package."""
    folder = resources.files("himoe.sweep").joinpath("specs")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def shipped_text(name: str) -> str:
    """Return the TOML text of a shipped sweep, or raise ConfigError with the nearest name."""
    if name not in (names := shipped_names()):
        raise ConfigError(
            f"no sweep {name!r}; known: {', '.join(names)}{nearest(name, names)} (a file of yours ends in .toml)"
        )
    return resources.files("himoe.sweep").joinpath("specs", f"{name}.toml").read_text(encoding="utf-8")
