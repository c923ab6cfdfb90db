"""What is wrong with a configuration, in words: the key, the value given, what is allowed, the nearest name."""

import re
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from himoe.config.toml import format_value
from himoe.errors import ConfigError, nearest

LONGEST_VALUE = 60
NOT_GIVEN = object()

WORDS = {
    "missing": "must be given",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text in quotes",
    "list_type": "must be a list, as in [{given}]",
    "tuple_type": "must be a list of two numbers",
    "model_type": "must be a table of keys",
    "model_attributes_type": "must be a table of keys",
    "dict_type": "must be a table of keys",
    "finite_number": "must be a finite number",
    "greater_than": "must be > {gt}",
    "greater_than_equal": "must be ≥ {ge}",
    "less_than": "must be < {lt}",
    "less_than_equal": "must be ≤ {le}",
    "too_short": "must have at least {min_length}",
    "too_long": "must have at most {max_length}",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "may hold letters, digits, '.', '_' and '-' only",
    "value_error": "{error}",
}

# How other projects call what is a key here; for hints only, none of them is accepted.
OTHER_NAMES = {
    "hidden_size": "model.dim",
    "d_model": "model.dim",
    "n_embd": "model.dim",
    "embed_dim": "model.dim",
    "num_hidden_layers": "model.num_layers",
    "n_layer": "model.num_layers",
    "n_layers": "model.num_layers",
    "num_attention_heads": "model.num_heads",
    "n_head": "model.num_heads",
    "n_heads": "model.num_heads",
    "num_key_value_heads": "model.num_kv_heads",
    "n_kv_heads": "model.num_kv_heads",
    "intermediate_size": "model.ffn_dim",
    "tie_word_embeddings": "model.tie_embeddings",
    "n_routed_experts": "moe.num_experts",
    "num_local_experts": "moe.num_experts",
    "num_experts_per_tok": "moe.top_k",
    "moe_intermediate_size": "moe.expert_dim",
    "lr": "train.learning_rate",
    "min_lr": "train.min_learning_rate_ratio",
    "min_lr_ratio": "train.min_learning_rate_ratio",
    "max_steps": "train.steps",
    "max_iters": "train.steps",
    "warmup_iters": "train.warmup_steps",
    "gradient_accumulation_steps": "train.accumulate",
    "grad_accum": "train.accumulate",
    "block_size": "train.seq_len",
    "max_seq_len": "train.seq_len",
    "context_length": "train.seq_len",
    "max_grad_norm": "train.grad_clip",
    "clip_grad_norm": "train.grad_clip",
    "grad_norm_clip": "train.grad_clip",
}


@dataclass(frozen=True)
class Problem:
    """One key that cannot stay as it is; `leaf` is the configuration's key that `key` lies in."""

    key: str
    text: str
    given: Any = NOT_GIVEN
    leaf: str = ""

    def __str__(self) -> str:
        if self.given is NOT_GIVEN:
            return f"{self.key}: {self.text}"
        value = format_value(self.given)
        if len(value) > LONGEST_VALUE:
            value = value[: LONGEST_VALUE - 1] + "…"
        return f"{self.key} = {value}: {self.text}"


def config_error(problems: list[Problem]) -> ConfigError:
    """Return one error for all problems: a single line, or a summary and a line for each."""
    if len(problems) == 1:
        return ConfigError(str(problems[0]))
    return ConfigError("\n  ".join([f"{len(problems)} problems in the configuration:", *map(str, problems)]))


def translate(error: ValidationError, keys: dict[str, list[str]]) -> list[Problem]:
    """Return pydantic's findings in the words above; `keys` are the known keys of each section and table within."""
    problems = []
    for found in error.errors(include_url=False):
        location = found["loc"]
        given = NOT_GIVEN if found["type"] == "missing" else found["input"]
        if found["type"] == "extra_forbidden":
            text = unknown_key(location, keys)
        elif found["type"] == "literal_error":
            choices = re.findall(r"'([^']*)'", found.get("ctx", {})["expected"])
            text = f"must be one of {', '.join(choices)}{nearest(str(given), choices)}"
        elif found["type"] in WORDS:
            text = WORDS[found["type"]].format(given=format_value(found["input"]), **found.get("ctx", {}))
        else:
            text = found["msg"]
        problems.append(Problem(_path(location), text, given, ".".join(map(str, location[:2]))))
    return problems


def unknown_key(location: tuple[int | str, ...], keys: dict[str, list[str]]) -> str:
    """Say that a key is unknown, with the key that is meant: here, in another section, or by another project."""
    *parents, last = (part for part in location if isinstance(part, str))  # without the places in lists
    siblings = keys.get(".".join(parents), [])
    elsewhere = {key: f"{section}.{key}" for section, names in keys.items() if section.isidentifier() for key in names}
    inside = len(parents) > 1  # a table within a section has keys of its own
    if not inside and (meant := elsewhere.get(last) or OTHER_NAMES.get(last)):
        return f"unknown key; did you mean {meant!r}?"
    hint = nearest(last, siblings) or ("" if inside else nearest(last, elsewhere))
    return f"unknown key{hint or '; known here: ' + ', '.join(siblings)}"


def _path(location: tuple[int | str, ...]) -> str:
    """Return `moe.balancers[0].name` for `("moe", "balancers", 0, "name")`."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.lstrip(".") or "configuration"
