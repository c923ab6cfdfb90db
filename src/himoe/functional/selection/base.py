"""What selectors share: their result, the checks of their options, and the choice among the experts that are wanted."""

from typing import NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from himoe.errors import ConfigError
from himoe.types import RouterContext

Selection = tuple[Int[Tensor, "T K"], Bool[Tensor, "T K"]]


def check_top_k(num_experts: int, top_k: int) -> None:
    """Raise `ConfigError` unless 1 ≤ K ≤ E."""
    if not 1 <= top_k <= num_experts:
        raise ConfigError(f"top_k = {top_k} must be between 1 and num_experts = {num_experts}")


def places(max_k: int | None, num_experts: int, name: str) -> int:
    """Return the number of places of a token, all E for None; raises `ConfigError` unless 1 ≤ max_k ≤ E."""
    if max_k is None:
        return num_experts
    if not 1 <= max_k <= num_experts:
        raise ConfigError(f"{name}: max_k = {max_k} must be between 1 and num_experts = {num_experts}")
    return max_k


def all_selected(expert_ids: Int[Tensor, "T K"]) -> Selection:
    """Return the ids with every place used."""
    return expert_ids, torch.ones_like(expert_ids, dtype=torch.bool)


def best_of(scores: Float[Tensor, "T E"], wanted: Bool[Tensor, "T E"], max_k: int) -> Selection:
    """Return the max_k best of each token's wanted experts, best first; places that are left over are not selected."""
    expert_ids = scores.where(wanted, -torch.inf).topk(max_k, dim=-1).indices
    return expert_ids, wanted.gather(-1, expert_ids)


def real_tokens(scores: Float[Tensor, "T E"], context: RouterContext) -> Int[Tensor, ""]:
    """Return the number of tokens that are not padding, on the device."""
    if context.mask is None:
        return torch.full((), scores.shape[0], dtype=torch.int64, device=scores.device)
    return context.mask.sum()


def refuse(name: str, reason: str) -> NoReturn:
    """Raise `ConfigError` in the selector's name."""
    raise ConfigError(f"{name}: {reason}")
