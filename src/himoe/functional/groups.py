"""Which experts form which group, and the sums and shares that every group formula needs.

Equal contiguous groups, group(e) = e // S, are the default and are summed by a reshape. An explicit list of groups may
be unequal and in any order (Hi-MoE, arXiv 2605.08292, section 3 allows both); its sums go through one index.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from himoe.errors import ConfigError
from himoe.functional.constants import numbers_on


@dataclass(frozen=True)
class Groups:
    """A partition of E experts into G groups.

    Args:
        members: one tuple of expert ids per group; together they hold 0 … E-1 exactly once.

    Attributes:
        num_experts: E.
        group_of: the group of every expert, E numbers.
        is_equal: True for contiguous groups of one size: the fast path.

    >>> Groups.equal(8, 4).members
    ((0, 1), (2, 3), (4, 5), (6, 7))
    """

    members: tuple[tuple[int, ...], ...]
    # Plain attributes, set once: torch.compile cannot trace a cached property, which takes a lock in Python 3.11.
    num_experts: int = field(init=False, repr=False, compare=False)
    group_of: tuple[int, ...] = field(init=False, repr=False, compare=False)
    is_equal: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        members = tuple(tuple(int(e) for e in group) for group in self.members)
        ids = [e for group in members for e in group]
        if not ids or sorted(ids) != list(range(len(ids))) or not all(members):
            raise ConfigError(
                f"groups = {members}: every expert 0 … E-1 must stand in exactly one group, and no group be empty"
            )
        of = {e: g for g, group in enumerate(members) for e in group}
        facts = {
            "members": members,
            "num_experts": len(ids),
            "group_of": tuple(of[e] for e in range(len(ids))),
            "is_equal": ids == sorted(ids) and len({len(group) for group in members}) == 1,
        }
        for name, value in facts.items():
            object.__setattr__(self, name, value)

    @classmethod
    def equal(cls, num_experts: int, num_groups: int) -> "Groups":
        """Return contiguous groups of S = E/G experts; raises `ConfigError` when G does not divide E."""
        if num_groups < 1 or num_experts % num_groups:
            raise ConfigError(f"num_groups = {num_groups} must divide num_experts = {num_experts}")
        size = num_experts // num_groups
        return cls(tuple(tuple(range(g * size, (g + 1) * size)) for g in range(num_groups)))

    @classmethod
    def of(cls, groups: "Groups | int | list[list[int]]", num_experts: int) -> "Groups":
        """Return `groups` itself, G equal groups for a number, or the groups of an explicit list; checks E."""
        if isinstance(groups, int):
            return cls.equal(num_experts, groups)
        result = groups if isinstance(groups, cls) else cls(tuple(tuple(g) for g in groups))  # type: ignore[arg-type]
        if result.num_experts != num_experts:
            raise ConfigError(f"groups name {result.num_experts} experts, the layer has num_experts = {num_experts}")
        return result

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.members)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Experts per group, S_g."""
        return tuple(len(group) for group in self.members)

    def sum(self, values: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch G"]:
        """Add up the values of each group."""
        if self.is_equal:
            return values.unflatten(-1, (self.num_groups, -1)).sum(-1)
        index = numbers_on(values.device, self.group_of)
        zeros = values.new_zeros(*values.shape[:-1], self.num_groups)
        return zeros.index_add(-1, index, values)

    def log_sum(self, log_values: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch G"]:
        """Return the logarithm of each group's sum, from logarithms: finite where the sum itself underflows."""
        if self.is_equal:
            return log_values.unflatten(-1, (self.num_groups, -1)).logsumexp(-1)
        columns = [numbers_on(log_values.device, members) for members in self.members]
        return torch.stack([log_values[..., members].logsumexp(-1) for members in columns], dim=-1)

    def shares(self, log_values: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        """Divide each value by its group's sum, from logarithms; right where the sum itself underflows."""
        if self.is_equal:
            return self._shares_by_member(log_values).movedim(0, -1).flatten(-2)
        columns = [numbers_on(log_values.device, members) for members in self.members]
        shares = torch.cat([log_values[..., members].softmax(-1) for members in columns], dim=-1)
        order = [e for group in self.members for e in group]
        place = tuple(sorted(range(self.num_experts), key=order.__getitem__))  # of every expert in that order
        return shares[..., numbers_on(log_values.device, place)]

    def _shares_by_member(self, log_values: Float[Tensor, "*batch S*G"]) -> Float[Tensor, "S *batch G"]:
        """Return the shares in equal groups, laid out so that a sum over a group's few experts runs along the tokens.

        On a CPU a softmax over a last dimension that is shorter than a vector takes ten times as long.
        """
        return log_values.unflatten(-1, (self.num_groups, -1)).movedim(-1, 0).contiguous().softmax(0)

    def concentration(self, log_values: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch G"]:
        """Add up the squared shares in each group, from logarithms: between 1/S_g and 1."""
        if self.is_equal:
            return self._shares_by_member(log_values).square().sum(0)
        return self.sum(self.shares(log_values).square())

    def expand(self, values: Float[Tensor, "*batch G"]) -> Float[Tensor, "*batch E"]:
        """Give every expert the value of its group."""
        if self.is_equal:
            return values.repeat_interleave(self.num_experts // self.num_groups, dim=-1)
        return values[..., numbers_on(values.device, self.group_of)]
