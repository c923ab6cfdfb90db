"""What decides the cost of a model: one description that configurations and published models both become.

Every part says its parameters and its products, the multiply-adds of matrix products for one token; a FLOP count is
twice that. Parts also describe what our configuration cannot name, since published models have it: biases, latent
attention, sinks, windows, learned positions.
"""

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Network:
    """One feed-forward network: a dense layer, a shared expert or a routed one.

    Attributes:
        hidden_dim: F.
        matrices: 3 with a gate beside the value (SwiGLU), else 2.
        bias: whether every output has one.
    """

    hidden_dim: int
    matrices: int = 3
    bias: bool = False

    def products(self, dim: int) -> int:
        """Return the multiply-adds of one token."""
        return self.matrices * dim * self.hidden_dim

    def parameters(self, dim: int) -> int:
        """Return the number of parameters."""
        return self.products(dim) + ((self.matrices - 1) * self.hidden_dim + dim if self.bias else 0)


@dataclass(frozen=True)
class Pool:
    """Experts of one kind and size.

    Attributes:
        num_experts: how many.
        used: how many of them a token uses; a fraction is an expectation over experts that are used alike.
        network: one of them; None for experts without hidden layer.
        constant: whether such experts hold a vector and two gate rows each, 3·D weights, read for every token.
    """

    num_experts: int
    used: Fraction
    network: Network | None
    constant: bool = False

    def parameters(self, dim: int) -> int:
        """Return the parameters of all its experts."""
        each = 3 * dim if self.constant else 0
        return self.num_experts * (each if self.network is None else self.network.parameters(dim))

    def products(self, dim: int) -> Fraction:
        """Return the multiply-adds of one token."""
        if self.network is None:
            return Fraction(self.parameters(dim))
        return self.used * self.network.products(dim)


@dataclass(frozen=True)
class Experts:
    """The feed-forward part of an MoE layer.

    Attributes:
        pools: the routed experts.
        top_k: K, places that the selector has for a token; pools' `used` sum to it.
        mean_top_k: experts that a token has on average, where fewer than the places; else K.
        gate_products: multiply-adds of the gate.
        gate_parameters: parameters of the whole router.
        group_sizes: experts of each group.
        group_top_k: experts taken from each group; None where they are taken from all alike.
        keep_groups: groups that a token's experts may come from; None for all.
        shared: the shared expert.
        shared_gate: whether it is weighed by a gate of D weights.
        any_number: whether a token may have fewer than K experts.
    """

    pools: tuple[Pool, ...]
    top_k: int
    mean_top_k: int
    gate_products: int
    gate_parameters: int
    group_sizes: tuple[int, ...]
    group_top_k: tuple[int, ...] | None = None
    keep_groups: int | None = None
    shared: Network | None = None
    shared_gate: bool = False
    any_number: bool = False

    @property
    def num_experts(self) -> int:
        """Return E."""
        return sum(pool.num_experts for pool in self.pools)

    @property
    def presence(self) -> Fraction:
        """Return the share of the places that a token fills on average."""
        return Fraction(self.mean_top_k, self.top_k)


@dataclass(frozen=True)
class Attention:
    """Attention with grouped queries.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: width of a head.
        qk_norm: weights of the norms of queries and keys.
        bias: whether all four projections have one.
        sinks: whether every query head has a learned logit that takes attention away.
        window: how many positions a token sees, its own included; None for all before it.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: int = 0
    bias: bool = False
    sinks: bool = False
    window: int | None = None

    @property
    def query_dim(self) -> int:
        """Return the width of all queries, which is that of the mixed values too."""
        return self.num_heads * self.head_dim

    @property
    def qkv_dim(self) -> int:
        """Return the width of queries, keys and values."""
        return self.query_dim + 2 * self.num_kv_heads * self.head_dim

    def products(self, dim: int) -> int:
        """Return the multiply-adds of one token in the projections."""
        return dim * self.qkv_dim + self.query_dim * dim

    def parameters(self, dim: int) -> int:
        """Return the number of parameters."""
        biases = self.qkv_dim + dim if self.bias else 0
        return self.products(dim) + self.qk_norm + biases + self.num_heads * self.sinks

    def score_products(self, seq_len: int) -> int:
        """Return the multiply-adds of one token with keys and values, none skipped for being later ones."""
        return 2 * self.query_dim * min(seq_len, self.window or seq_len)


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): queries, keys and values through narrow vectors.

    Attributes:
        num_heads: heads.
        query_rank: width of the vector that queries come from.
        kv_rank: width of the vector that keys and values come from.
        nope_dim: width of a head's query and key without position.
        rope_dim: width of their part with rotary position, one key for all heads.
        value_dim: width of a head's value.
    """

    num_heads: int
    query_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    @property
    def query_dim(self) -> int:
        """Return the width of all queries."""
        return self.num_heads * (self.nope_dim + self.rope_dim)

    @property
    def qkv_dim(self) -> int:
        """Return the width of queries, keys and values of all heads."""
        return 2 * self.query_dim + self.num_heads * self.value_dim

    def products(self, dim: int) -> int:
        """Return the multiply-adds of one token in the projections."""
        query = dim * self.query_rank + self.query_rank * self.query_dim
        latent = dim * (self.kv_rank + self.rope_dim)
        key_value = self.kv_rank * self.num_heads * (self.nope_dim + self.value_dim)
        return query + latent + key_value + self.num_heads * self.value_dim * dim

    def parameters(self, dim: int) -> int:
        """Return the number of parameters: the projections and a norm of each narrow vector."""
        return self.products(dim) + self.query_rank + self.kv_rank

    def score_products(self, seq_len: int) -> int:
        """Return the multiply-adds of one token with keys and values, none skipped for being later ones."""
        return (self.query_dim + self.num_heads * self.value_dim) * seq_len


@dataclass(frozen=True)
class Layer:
    """Layers that are alike: `count` times attention and a feed-forward part, with a norm of D weights before each."""

    count: int
    attention: Attention | LatentAttention
    feed_forward: Network | Experts


@dataclass(frozen=True)
class Shape:
    """A decoder language model as far as its cost goes.

    Attributes:
        name: of the recipe, file or model.
        vocab_size: V.
        dim: D.
        tie_embeddings: whether the head is the input embedding.
        layers: all layers, those alike together.
        positions: learned position embeddings.
        source: where the numbers of a published model come from.
    """

    name: str
    vocab_size: int
    dim: int
    tie_embeddings: bool
    layers: tuple[Layer, ...]
    positions: int = 0
    source: str | None = None

    @property
    def num_layers(self) -> int:
        """Return L."""
        return sum(layer.count for layer in self.layers)

    @property
    def experts(self) -> Experts | None:
        """Return the MoE layers' feed-forward part, which is one for all of them; None for a dense model."""
        return next((layer.feed_forward for layer in self.layers if isinstance(layer.feed_forward, Experts)), None)
