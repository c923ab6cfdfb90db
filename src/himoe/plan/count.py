"""Parameters and FLOPs of a shape, by role. A test holds both against the real model.

Parameters as `himoe.parameter_counts` counts them. FLOPs are those of matrix products, 2 a multiply-add, as
`torch.utils.flop_counter` counts them; what is elementwise (norms, activations, softmax) is left out, as is usual.
"""

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from himoe.plan.shape import Experts, Layer, Network, Shape

ROLES = (
    "input_embedding", "head", "attention", "attention_scores", "router", "experts", "shared_expert", "dense", "norms",
)  # fmt: skip
"""What parameters and FLOPs are told apart by."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters; a tied embedding counts once, as the head.

    Attributes:
        total: all of them.
        active: what one token uses, both embeddings included.
        active_without_input_embedding: `active` without the input embedding, unless the head is tied to it.
        active_without_embeddings: `active` without input embedding, learned positions and head.
        total_without_embeddings: `total` without them.
        by_role: `total` by role.
        active_by_role: `active` by role.
        hidden_matrices: those that Muon updates, all but embeddings, routers and vectors.
    """

    total: int
    active: int
    active_without_input_embedding: int
    active_without_embeddings: int
    total_without_embeddings: int
    by_role: dict[str, int]
    active_by_role: dict[str, int]
    hidden_matrices: int


def parameters(shape: Shape) -> Parameters:
    """Count a shape's parameters.

    >>> from himoe.plan import named_shape
    >>> counts = parameters(named_shape("mixtral_8x7b"))
    >>> counts.total, counts.active
    (46702792704, 12879925248)
    """
    embedding = shape.vocab_size * shape.dim
    total = Counter(head=embedding, norms=shape.dim, input_embedding=shape.positions * shape.dim)
    total["input_embedding"] += 0 if shape.tie_embeddings else embedding
    idle = matrices = 0
    for layer in shape.layers:
        total["attention"] += layer.count * layer.attention.parameters(shape.dim)
        total["norms"] += layer.count * 2 * shape.dim
        matrices += layer.count * layer.attention.products(shape.dim)
        for role, number in _feed_forward(layer, shape.dim).items():
            total[role] += layer.count * number
        matrices += layer.count * _matrices(layer, shape.dim)
        if isinstance(layer.feed_forward, Experts):
            idle += layer.count * _idle(layer.feed_forward, shape.dim)
    everything = sum(total.values())
    embeddings = total["head"] + total["input_embedding"]
    active = everything - idle
    by_role = {role: total[role] for role in ROLES if total[role]}
    return Parameters(
        total=everything,
        active=active,
        active_without_input_embedding=active - total["input_embedding"],
        active_without_embeddings=active - embeddings,
        total_without_embeddings=everything - embeddings,
        by_role=by_role,
        active_by_role={role: number - idle * (role == "experts") for role, number in by_role.items()},
        hidden_matrices=matrices,
    )


def _feed_forward(layer: Layer, dim: int) -> dict[str, int]:
    """Return the parameters of one layer's feed-forward part by role."""
    part = layer.feed_forward
    if not isinstance(part, Experts):
        return {"dense": part.parameters(dim)}
    shared = 0 if part.shared is None else part.shared.parameters(dim) + dim * part.shared_gate
    return {
        "experts": sum(pool.parameters(dim) for pool in part.pools),
        "router": part.gate_parameters,
        "shared_expert": shared,
    }


def _matrices(layer: Layer, dim: int) -> int:
    """Return how many weights of one layer's feed-forward part stand in hidden matrices."""
    part = layer.feed_forward
    if not isinstance(part, Experts):
        return part.products(dim)
    routed = sum(pool.num_experts * pool.network.products(dim) for pool in part.pools if pool.network)
    return routed + (0 if part.shared is None else part.shared.products(dim))


def _idle(part: Experts, dim: int) -> int:
    """Return how many weights of the routed experts of a layer a token leaves alone."""
    used = sum((pool.parameters(dim) * pool.used / pool.num_experts for pool in part.pools), Fraction())
    return sum(pool.parameters(dim) for pool in part.pools) - int(used)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token in training.

    Attributes:
        forward: of the forward pass.
        backward: twice that: every product has two gradients.
        recompute: of what is computed again in the backward pass (`train.recompute`).
        total: all three.
        forward_by_role: `forward` by role; `attention` is its projections, `attention_scores` queries with keys and
            weights with values. These are counted for all positions of a sequence, later ones included, which kernels
            may skip; they grow with the length of the sequence.
    """

    forward: float
    backward: float
    recompute: float
    total: float
    forward_by_role: dict[str, float]


def flops(shape: Shape, seq_len: int, recompute: str = "none") -> Flops:
    """Count the FLOPs of one token of a sequence.

    Args:
        shape: of the model.
        seq_len: tokens that attention sees.
        recompute: `none`, `selective`, which keeps the results of all products, or `full`, which computes the layers
            again up to their last product.
    """
    products: dict[str, Fraction] = dict.fromkeys(ROLES, Fraction())
    products["head"] += shape.vocab_size * shape.dim
    last = Fraction()
    for layer in shape.layers:
        products["attention"] += layer.count * layer.attention.products(shape.dim)
        products["attention_scores"] += layer.count * layer.attention.score_products(seq_len)
        for role, number in _layer_products(layer, shape.dim).items():
            products[role] += layer.count * number
        last += layer.count * _not_recomputed(layer, shape.dim)
    by_role = {role: float(2 * products[role]) for role in ROLES if products[role]}
    forward = float(2 * sum(products.values()))
    again = float(2 * (sum(products.values()) - products["head"] - last)) if recompute == "full" else 0.0
    return Flops(forward, 2 * forward, again, 3 * forward + again, by_role)


def _layer_products(layer: Layer, dim: int) -> dict[str, Fraction]:
    """Return the multiply-adds of one token in one layer's feed-forward part, by role."""
    part = layer.feed_forward
    if not isinstance(part, Experts):
        return {"dense": Fraction(part.products(dim))}
    routed = sum((_pool_products(part, index, dim) for index in range(len(part.pools))), Fraction())
    shared = 0 if part.shared is None else part.shared.products(dim) + dim * part.shared_gate
    return {"experts": routed, "router": Fraction(part.gate_products), "shared_expert": Fraction(shared)}


def _pool_products(part: Experts, index: int, dim: int) -> Fraction:
    pool = part.pools[index]
    return pool.products(dim) * (1 if pool.network is None else part.presence)


def _not_recomputed(layer: Layer, dim: int) -> Fraction:
    """Return the multiply-adds at the end of a layer that its gradients do not need the result of."""
    part = layer.feed_forward
    last = part.shared if isinstance(part, Experts) and not part.shared_gate else part
    return Fraction(last.hidden_dim * dim) if isinstance(last, Network) else Fraction()
