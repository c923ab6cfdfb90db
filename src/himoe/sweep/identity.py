"""What makes two runs the same: a hash of the resolved configuration without what changes no result.

Keys at their defaults do not count, so that a new key of a later version leaves old runs what they are. Because a
default may change too, a run folder's configuration is compared key by key before it is taken for a run's own.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from himoe.config import Config

VOLATILE = frozenset(
    {
        "name",
        "data.workers",
        "moe.force",
        "moe.allow_non_causal",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.keep_every",
        "train.keep_best",
        "train.log_to",
        "train.threads",
    }
)
"""Keys that change where a run writes, how fast it is or what is refused, but none of its results."""


def run_id(config: Config) -> str:
    """Return the identity of a run: 12 hexadecimal digits.

    >>> from himoe.config import load_config
    >>> one, other = (load_config("lm_tiny", sets=[f"train.threads={n}"]) for n in (1, 2))
    >>> run_id(one) == run_id(other) != run_id(load_config("lm_tiny", sets=["seed=1"]))
    True
    """
    flat = flat_config(config.model_dump(mode="json", exclude_defaults=True))
    text = json.dumps(flat, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(stored: Config, config: Config) -> list[str]:
    """Return the keys in which two configurations are not the same run."""
    one, other = (flat_config(each.model_dump(mode="json")) for each in (stored, config))
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def flat_config(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration by dotted keys, tables within sections too, without the volatile ones."""
    return {key: value for key, value in _leaves(tree, "") if key not in VOLATILE}


def _leaves(tree: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found += _leaves(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return found
