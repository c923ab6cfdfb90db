"""The same active parameters in more or fewer, larger or smaller experts (Slicing and Dicing, arXiv 2605.11689)."""

from dataclasses import replace
from fractions import Fraction

from himoe.errors import ConfigError
from himoe.plan.shape import Experts, Layer, Shape


def sliced(shape: Shape, *, sparsity: Fraction | None = None, granularity: Fraction | None = None) -> Shape:
    """Return the shape with experts of another number and size, and K·F as it was, so that active stays but for gates.

    Args:
        shape: with one kind of expert.
        sparsity: s = E/K; None keeps it.
        granularity: g = F/(4·D); None keeps it.

    Raises:
        ConfigError: no experts or several kinds, or numbers that are not whole.

    >>> from himoe.plan import named_shape
    >>> experts = sliced(named_shape("sd_50m"), sparsity=Fraction(64), granularity=Fraction(1, 4)).experts
    >>> experts.num_experts, experts.top_k, experts.pools[0].network.hidden_dim
    (256, 4, 240)
    """
    old = shape.experts
    network = old.pools[0].network if old is not None and len(old.pools) == 1 else None
    if old is None or network is None:
        raise ConfigError(f"{shape.name}: --sparsity and --granularity need a model with experts of one kind")
    hidden = Fraction(network.hidden_dim) if granularity is None else 4 * shape.dim * granularity
    top_k = Fraction(old.top_k * network.hidden_dim) / hidden
    number = top_k * (Fraction(old.num_experts, old.top_k) if sparsity is None else sparsity)
    for name, value in (("moe.expert_dim", hidden), ("moe.top_k", top_k), ("moe.num_experts", number)):
        if value.denominator != 1 or value < 1:
            raise ConfigError(
                f"{shape.name}: --sparsity and --granularity lead to {name} = {float(value):g}, which must be whole"
            )
    if number < top_k:
        raise ConfigError(f"--sparsity {sparsity}: must be ≥ 1, there are at least as many experts as a token has")
    experts = _experts(old, shape.name, int(number), int(top_k))
    experts = replace(experts, pools=(replace(experts.pools[0], network=replace(network, hidden_dim=int(hidden))),))
    layers = [layer if layer.feed_forward != old else replace(layer, feed_forward=experts) for layer in shape.layers]
    return replace(shape, layers=tuple(Layer(one.count, one.attention, one.feed_forward) for one in layers))


def _experts(old: Experts, name: str, number: int, top_k: int) -> Experts:
    """Return the experts in another number; groups stay as many, with an equal share each."""
    groups = len(old.group_sizes)
    if number % groups or (old.group_top_k is not None and top_k % groups):
        raise ConfigError(
            f"{name}: --sparsity and --granularity lead to {number} experts, {top_k} for each token, which do not "
            f"divide over {groups} groups"
        )
    return replace(
        old,
        pools=(replace(old.pools[0], num_experts=number, used=Fraction(top_k)),),
        top_k=top_k,
        mean_top_k=top_k,
        gate_products=old.gate_products // old.num_experts * number,
        gate_parameters=old.gate_parameters // old.num_experts * number,
        group_sizes=(number // groups,) * groups,
        group_top_k=None if old.group_top_k is None else (top_k // groups,) * groups,
    )
