"""The recipes that come with the package: complete TOML files, the first line a one-line description."""

from importlib import resources
from pathlib import Path

from himoe.errors import ConfigError, nearest

DEFAULT_RECIPE = "lm_demo"


def recipe_names() -> list[str]:
    """Return the names of all recipes, sorted."""
    folder = resources.files("himoe").joinpath("recipes")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def recipe_text(name: str) -> str:
    """Return the TOML text of a recipe, or raise `ConfigError` with the nearest name."""
    names = recipe_names()
    if name not in names:
        kind = "folder" if Path(name).is_dir() else "file"
        here = f"; {name} is a {kind}: did you mean --data {name}?" if Path(name).exists() else ""
        raise ConfigError(
            f"no recipe {name!r}; known: {', '.join(names)}{nearest(name, names)} (a file of yours ends in .toml){here}"
        )
    return resources.files("himoe").joinpath("recipes", f"{name}.toml").read_text(encoding="utf-8")


def recipe_description(name: str) -> str:
    """Return the one-line description of a recipe, which is its first comment."""
    return recipe_text(name).partition("\n")[0].lstrip("# ").strip()
