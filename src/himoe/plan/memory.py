"""Memory of one rank in training, in bytes: what lasts from step to step, and what a micro-batch adds.

Weights, gradients, optimizer state and averages are exact. What a micro-batch keeps for its backward pass is read off
`models/`, tensor by tensor, for attention without stored scores; a test holds it against the memory that a forward pass
takes. Not counted: what the allocator wastes, workspaces, the data, and the buffers of communication.

Weights are fp32. With `precision = "bf16"` products are computed from bf16 copies, and the residual stream, norms and
router stay fp32. The norms are those of a CPU, or of autocast, which keep one tensor more than a fused kernel does.
"""

from dataclasses import dataclass

from himoe.config import TrainConfig
from himoe.errors import ConfigError
from himoe.plan.count import Parameters, parameters
from himoe.plan.shape import Attention, Experts, Layer, Network, Shape

FP32, BF16, INT64 = 4, 2, 8
CHUNK, LEAST_ROWS = 2**22, 512
"""Logits that the head computes at a time, as in `functional/cross_entropy.py`."""


@dataclass(frozen=True)
class Ranks:
    """How a model is spread.

    Attributes:
        dp: ranks that each read their share of a batch.
        ep: how many of them share the experts of a layer; the other weights are on every rank.
        shard: whether weights, gradients and optimizer state are split over all ranks (FSDP).
    """

    dp: int = 1
    ep: int = 1
    shard: bool = False

    def rows(self, train: TrainConfig) -> int:
        """Return the sequences of a micro-batch on one rank.

        As `train.accumulate` says, where that divides over the ranks; else the most that are no more than that, with
        other micro-batches in a step, at least one.

        Raises:
            ConfigError: numbers that do not divide each other or the batch.

        >>> from himoe.config import load_config
        >>> train = load_config("olmoe_7b").train  # 1024 sequences, 4 of them at once
        >>> Ranks(dp=2).rows(train), Ranks(dp=64).rows(train)
        (2, 1)
        """
        if self.dp < 1 or self.ep < 1 or self.dp % self.ep:
            raise ConfigError(f"--dp {self.dp} --ep {self.ep}: both must be ≥ 1, and ep must divide dp")
        if train.batch_size % self.dp:
            raise ConfigError(f"--dp {self.dp}: must divide train.batch_size ({train.batch_size})")
        share = train.batch_size // self.dp
        return next(rows for rows in range(max(1, share // train.accumulate), 0, -1) if share % rows == 0)

    def check_experts(self, experts: Experts) -> None:
        """Raise ConfigError for experts that cannot be shared out equally."""
        for pool in experts.pools:
            if pool.network and pool.num_experts % self.ep:
                raise ConfigError(f"--ep {self.ep}: must divide the number of experts ({pool.num_experts})")


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        weights: fp32.
        gradients: fp32.
        optimizer: two fp32 numbers a weight, one for the matrices of Muon.
        average: of the weights, where there is one.
        cast_weights: bf16 copies, or what is gathered of sharded weights.
        activations: what the layers keep for the backward pass, at the recompute that training asks for.
        head: gradient of the head, taken in the forward pass, and a chunk of logits.
        total: all of them.
        activations_by_recompute: `activations` for each setting of `train.recompute`.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    cast_weights: int
    activations: int
    head: int
    total: int
    activations_by_recompute: dict[str, int]


def memory(shape: Shape, train: TrainConfig, ranks: Ranks | None = None, *, documents: bool = True) -> Memory:
    """Return the memory of one rank.

    Args:
        shape: of the model.
        train: sizes of a batch, optimizer, precision, recompute.
        ranks: how the model is spread; one rank by default.
        documents: whether attention gets a mask that ends at the borders of documents.

    Raises:
        ConfigError: ranks that do not divide the batch or the experts.
    """
    ranks = Ranks() if ranks is None else ranks
    rows = ranks.rows(train)
    if shape.experts is not None:
        ranks.check_experts(shape.experts)
    counts = parameters(shape)
    held = _held(counts, ranks)
    hidden = _hidden_matrices(shape, counts, ranks)
    tokens = rows * train.seq_len
    kept = {mode: _activations(shape, train, mode, tokens, documents) for mode in ("none", "selective", "full")}
    parts = {
        "weights": FP32 * held,
        "gradients": FP32 * held,
        "optimizer": 2 * FP32 * held - (FP32 * hidden if train.optimizer == "muon" else 0),
        "average": 0 if train.ema_decay is None else FP32 * held,
        "cast_weights": _copies(shape, train, ranks),
        "activations": kept[train.recompute],
        "head": _head(shape, train, tokens),
    }
    return Memory(**parts, total=sum(parts.values()), activations_by_recompute=kept)


def _held(counts: Parameters, ranks: Ranks) -> int:
    """Return how many parameters a rank keeps."""
    if ranks.shard:
        return -(-counts.total // ranks.dp)
    routed = counts.by_role.get("experts", 0)
    return counts.total - routed + -(-routed // ranks.ep)


def _hidden_matrices(shape: Shape, counts: Parameters, ranks: Ranks) -> int:
    """Return how many of them stand in matrices that Muon updates."""
    if ranks.shard:
        return counts.hidden_matrices // ranks.dp
    routed = sum(layer.count * _routed_products(layer, shape.dim) for layer in shape.layers)
    return counts.hidden_matrices - routed + routed // ranks.ep


def _routed_products(layer: Layer, dim: int) -> int:
    """Return the weights in matrices of a layer's routed experts."""
    part = layer.feed_forward
    pools = part.pools if isinstance(part, Experts) else ()
    return sum(pool.num_experts * pool.network.products(dim) for pool in pools if pool.network)


def _copies(shape: Shape, train: TrainConfig, ranks: Ranks) -> int:
    """Return the bytes of weights that exist a second time while a layer runs.

    Autocast keeps a bf16 copy of every matrix until the backward pass, with recompute of one layer alone. Of sharded
    weights two layers are whole, the one that runs and the one that is fetched meanwhile.
    """
    size = BF16 if train.precision == "bf16" else FP32
    layers = {layer: size * _layer_matrices(layer, shape.dim, ranks.ep) for layer in shape.layers}
    if ranks.shard:
        return 2 * max(layers.values())
    if train.precision == "fp32":
        return 0
    if train.recompute != "none":
        return max(layers.values())
    return sum(layer.count * number for layer, number in layers.items())


def _layer_matrices(layer: Layer, dim: int, ep: int) -> int:
    part = layer.feed_forward
    always = part.products(dim) if isinstance(part, Network) else part.shared.products(dim) if part.shared else 0
    return layer.attention.products(dim) + always + _routed_products(layer, dim) // ep


def _head(shape: Shape, train: TrainConfig, tokens: int) -> int:
    """Return the bytes of both gradients that the head takes in advance, and of a chunk of its logits."""
    rows = min(tokens, max(LEAST_ROWS, CHUNK // shape.vocab_size))
    narrow = 2 * BF16 if train.precision == "bf16" else 0
    return FP32 * shape.dim * (shape.vocab_size + tokens) + rows * shape.vocab_size * (2 * FP32 + narrow)


def _activations(shape: Shape, train: TrainConfig, recompute: str, tokens: int, documents: bool) -> int:
    """Return the bytes that layers keep; with recompute, all of one layer exists beside that in the backward pass."""
    size = BF16 if train.precision == "bf16" else FP32
    whole = [(_whole_layer(layer, shape.dim, size, train.seq_len, documents), layer.count) for layer in shape.layers]
    last = 2 * FP32 * shape.dim  # the final norm
    if recompute == "none":
        return tokens * (sum(each * count for each, count in whole) + last)
    keeps = _selective_layer if recompute == "selective" else _full_layer
    kept = sum(layer.count * keeps(layer, shape.dim, size) for layer in shape.layers)
    return tokens * (kept + max(each for each, _ in whole) + last)


def _whole_layer(layer: Layer, dim: int, size: int, seq_len: int, documents: bool) -> int:
    """Return the bytes that one token of a layer keeps without recompute."""
    attention = layer.attention
    heads, kv_dim = attention.num_heads, (attention.qkv_dim - attention.query_dim) // 2
    norms = 2 * (2 * FP32 * dim) + 2 * size * dim  # the stream, normalised, and what projections read
    mixed = attention.qkv_dim + attention.query_dim + kv_dim + 2 * attention.query_dim
    kept = norms + size * mixed + FP32 * heads
    if isinstance(attention, Attention) and attention.qk_norm:
        kept += FP32 * (attention.query_dim + kv_dim) * (2 if size == BF16 else 1)
    if documents:
        kept += size * seq_len
    return kept + _whole_feed_forward(layer.feed_forward, dim, size)


def _whole_feed_forward(part: Network | Experts, dim: int, size: int) -> int:
    if isinstance(part, Network):
        return size * (_outputs(part) + part.hidden_dim * (2 if part.matrices == 3 else 1))
    kept = _routing(part) + (FP32 * dim if size == BF16 else 0)  # what the gate reads
    for pool in part.pools:
        if pool.network:
            kept += part.top_k * (size * _outputs(pool.network) + 2 * INT64)
    if part.shared is not None:
        kept += _whole_feed_forward(part.shared, dim, size)
    return kept


def _outputs(network: Network) -> int:
    """Return the width of what a network computes first."""
    return (network.matrices - 1) * network.hidden_dim


def _routing(part: Experts) -> int:
    """Return the bytes of a token's scores, in the router and in its losses, and of its choice, about."""
    return 3 * FP32 * part.num_experts + part.top_k * (INT64 + 1 + 5 * FP32)


def _full_layer(layer: Layer, dim: int, size: int) -> int:  # noqa: ARG001
    """Return the bytes of a token's layer input and of its routing, which the losses need too."""
    part = layer.feed_forward
    choice = _routing(part) + part.top_k * (INT64 + 1) if isinstance(part, Experts) else 0
    return FP32 * dim + choice


def _selective_layer(layer: Layer, dim: int, size: int) -> int:
    """Return the bytes of a token's layer input and of the results of its products."""
    part, attention = layer.feed_forward, layer.attention
    kept = size * (attention.qkv_dim + attention.query_dim + 2 * dim) + FP32 * attention.num_heads
    if isinstance(part, Network):
        return _full_layer(layer, dim, size) + kept + size * _outputs(part)
    kept += FP32 * part.num_experts
    networks = [pool.network for pool in part.pools if pool.network]
    kept += size * (sum(part.top_k * _outputs(network) for network in networks) + dim * (len(networks) - 1))
    if part.shared is not None:
        kept += size * (_outputs(part.shared) + dim)
    return _full_layer(layer, dim, size) + kept
