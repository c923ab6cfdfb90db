"""Published models by name, read from `models.toml`.

| key | meaning |
|---|---|
| `source` | where the numbers come from |
| `training` | the recipe whose batch, sequence length and optimizer a plan takes; `olmoe_7b` unless given |
| `vocab_size`, `dim`, `num_layers`, `positions`, `tie_embeddings` | as in `Shape` |
| `attention` | keys of `Attention`; `num_kv_heads` as many as heads, `head_dim` D/heads unless given; `qk_norm` over each "head" or over the whole "width" |
| `latent_attention` | keys of `LatentAttention`, in its place |
| `window_every` | every so many layers see `attention.window` positions, the others all |
| `moe_every`, `dense_layers` | every so many layers have experts; so many first layers have none |
| `ffn_dim`, `ffn` | of layers without experts |
| `moe` | as in a configuration, with `top_k_per_group` a number, and biases of experts and router |
"""  # noqa: E501

import tomllib
from fractions import Fraction
from functools import cache
from importlib import resources
from typing import Any

from himoe.errors import ConfigError, nearest
from himoe.plan.shape import Attention, Experts, LatentAttention, Layer, Network, Pool, Shape
from himoe.registry import having

DEFAULT_TRAINING = "olmoe_7b"


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(resources.files("himoe").joinpath("plan", "models.toml").read_text(encoding="utf-8"))


def model_names() -> list[str]:
    """Return the names of all published models."""
    return list(_tables())


def _table(name: str) -> dict[str, Any]:
    if name not in _tables():
        raise ConfigError(f"no model {name!r}; known: {', '.join(_tables())}{nearest(name, model_names())}")
    return _tables()[name]


def training_of(name: str) -> str:
    """Return the recipe whose training section goes with a published model; raises ConfigError for an unknown name."""
    return _table(name).get("training", DEFAULT_TRAINING)


def named_shape(name: str) -> Shape:
    """Return the shape of a published model; raises ConfigError for an unknown name.

    >>> named_shape("mixtral_8x7b").num_layers
    32
    """
    table = _table(name)
    dim, number = table["dim"], table["num_layers"]
    experts = _experts(table["moe"], dim)
    dense = Network(table.get("ffn_dim", 0), having("experts", "matrices")[table.get("ffn", "swiglu")])
    layers: dict[tuple[Any, Any], int] = {}
    for index in range(number):
        has_experts = index >= table.get("dense_layers", 0) and (index + 1) % table.get("moe_every", 1) == 0
        kind = (_attention(table, dim, index), experts if has_experts else dense)
        layers[kind] = layers.get(kind, 0) + 1
    return Shape(
        name=name,
        vocab_size=table["vocab_size"],
        dim=dim,
        tie_embeddings=table.get("tie_embeddings", False),
        layers=tuple(Layer(count, *kind) for kind, count in layers.items()),
        positions=table.get("positions", 0),
        source=table["source"],
    )


def _attention(table: dict[str, Any], dim: int, index: int) -> Attention | LatentAttention:
    if latent := table.get("latent_attention"):
        return LatentAttention(**latent)
    given = dict(table["attention"])
    heads = given["num_heads"]
    given = {"num_kv_heads": heads, "head_dim": dim // heads} | given
    widths = {"head": 2 * given["head_dim"], "width": (heads + given["num_kv_heads"]) * given["head_dim"]}
    given["qk_norm"] = widths.get(given.get("qk_norm", ""), 0)
    if index % table.get("window_every", 1):
        given["window"] = None
    return Attention(**given)


def _experts(moe: dict[str, Any], dim: int) -> Experts:
    number, groups = moe["num_experts"], moe.get("num_groups", 1)
    each = moe.get("top_k_per_group")
    top_k = moe["top_k"] if each is None else groups * each
    matrices = having("experts", "matrices")[moe.get("experts", "swiglu")]
    return Experts(
        pools=(Pool(number, Fraction(top_k), Network(moe["expert_dim"], matrices, moe.get("expert_bias", False))),),
        top_k=top_k,
        mean_top_k=top_k,
        gate_products=number * dim,
        gate_parameters=number * dim + number * moe.get("router_bias", False),
        group_sizes=(number // groups,) * groups,
        group_top_k=None if each is None else (each,) * groups,
        keep_groups=moe.get("keep_groups"),
        shared=Network(moe["shared_dim"], matrices) if moe.get("shared_dim") else None,
    )
