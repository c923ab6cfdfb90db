"""Which experts a text uses: balance per layer over all of it, and how much an expert tells about a token's domain.

I(domain; expert) is the mutual information in bits of the domain and the expert of a token–expert pair, every domain
weighing the same whatever its size. It lies between 0 and min(log2 D, log2 E). A finite sample is above 0 by chance,
and the tokens of one document go together, so the yardstick is a permutation of documents: its floor is what the
luckier 5 % of the permutations reach. Documents are dealt out to BLOCKS blocks per domain as they come, and the blocks
are permuted, so memory is O(BLOCKS·E) a layer and domain however many documents there are. A block of n documents
deviates from the mean by 1/√n of what one does, so what changes places is √n times the deviation of a block's shares.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from himoe.functional import losses, stats
from himoe.functional.groups import Groups
from himoe.types import Routing

BLOCKS = 32
PERMUTATIONS = 100


class Usage:
    """Pairs per expert of the L MoE layers on one domain. MaxVio and CV count pairs as selected, `load` as kept.

    Args:
        layer_indices: where the MoE layers stand in the model, in the order of the routings.
        groups: the groups to measure by, whether or not the router chooses by group.
        device: where routings live.
    """

    def __init__(self, layer_indices: Sequence[int], groups: Groups, device: torch.device | str = "cpu") -> None:
        self.layer_indices, self.groups = list(layer_indices), groups
        shape = (len(self.layer_indices), groups.num_experts)
        self._blocks = torch.zeros(shape[0], BLOCKS, shape[1], dtype=torch.int64, device=device)
        self._kept = torch.zeros(shape, dtype=torch.int64, device=device)
        self._means = torch.zeros(2, shape[0], dtype=torch.float64, device=device)  # Σ over tokens of Σm² and of C
        self._tokens = torch.zeros((), dtype=torch.int64, device=device)
        self._documents = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def observe(self, routings: Sequence[Routing], documents: Int[Tensor, " T"]) -> None:
        """Add one batch; `documents` numbers the document of every token, from 0. Padding is not counted."""
        if not routings:
            return
        block, num_experts = (documents % BLOCKS)[:, None], self.groups.num_experts
        mask = routings[0].context.mask
        tokens = mask.sum() if mask is not None else torch.tensor(len(documents), device=documents.device)
        self._tokens += tokens
        self._documents = torch.maximum(self._documents, documents.max() + 1)
        for layer, routing in enumerate(routings):
            place = block * num_experts + routing.expert_ids
            pairs = stats.count_pairs(place, routing.selected, BLOCKS * num_experts)
            self._blocks[layer] += pairs.view(BLOCKS, num_experts)
            self._kept[layer] += stats.load(routing)
            self._means[:, layer] += tokens * torch.stack(losses.group_measures(routing, self.groups))

    def __add__(self, other: "Usage") -> "Usage":
        result = Usage(self.layer_indices, self.groups, self._kept.device)
        for name in ("_blocks", "_kept", "_means", "_tokens", "_documents"):
            setattr(result, name, getattr(self, name) + getattr(other, name))
        return result

    def records(self) -> list[dict[str, Any]]:
        """Return one record per layer; `global` in a name: over the whole text."""
        if not self.layer_indices:
            return []
        selected, kept = self._blocks.sum(1), self._kept
        pairs = selected.sum(-1)
        group_mass, concentration = self._means / self._tokens.clamp(min=1)
        columns = {
            "experts_per_token": pairs / self._tokens.clamp(min=1),
            "drop_rate": (pairs - kept.sum(-1)) / pairs.clamp(min=1),
            "max_vio_global": stats.max_vio(selected),
            "cv_global": stats.coefficient_of_variation(selected),
            "effective_experts": stats.effective_experts(selected),
            "normalized_entropy": stats.normalized_entropy(selected),
            "group_mass": group_mass,
            "concentration": concentration,
        }
        rows = torch.stack(list(columns.values()), dim=-1).tolist()
        dead = [[expert for expert, is_dead in enumerate(row) if is_dead] for row in stats.is_dead(selected).tolist()]
        return [
            {"layer": layer, "load": load, **dict(zip(columns, row, strict=True)), "dead_experts": experts}
            for layer, load, row, experts in zip(self.layer_indices, kept.tolist(), rows, dead, strict=True)
        ]

    @property
    def blocks(self) -> np.ndarray:
        """Selected pairs (L, BLOCKS, E) of the blocks of documents."""
        return self._blocks.cpu().numpy()

    @property
    def documents(self) -> np.ndarray:
        """Documents (BLOCKS,) in every block."""
        return (int(self._documents) + np.arange(BLOCKS)[::-1]) // BLOCKS


def mutual_information(load: Float[np.ndarray, "*batch D E"]) -> Float[np.ndarray, "*batch"]:
    """I(domain; expert) in bits of pairs per domain and expert, the domains weighing the same; empty ones are left out.

    >>> mutual_information(np.array([[3, 0], [0, 7]])), mutual_information(np.array([[1, 2], [2, 4]]))
    (np.float64(1.0), np.float64(0.0))
    """
    total = load.sum(-1, keepdims=True)
    shares = load / np.maximum(total, 1)
    weights = (total > 0) / np.maximum((total > 0).sum(-2, keepdims=True), 1)
    together = (weights * shares).sum(-2)
    within = (weights[..., 0] * _entropy(shares)).sum(-1)
    return np.maximum(_entropy(together) - within, 0.0)


def _entropy(shares: np.ndarray) -> np.ndarray:
    return -(shares * np.log2(np.where(shares > 0, shares, 1.0))).sum(-1)


def domain_information(usages: Mapping[str, Usage]) -> list[dict[str, float | None]]:
    """Return `{"domain_information", "…_maximum", "…_floor"}` of every layer, in bits; None for a single domain.

    Equal text gives equal numbers: the permutations come from a generator of their own.
    """
    read = [usage for usage in usages.values() if usage.blocks.any()]
    names = ("domain_information", "domain_information_maximum", "domain_information_floor")
    if len(read) < 2:
        layers = len(next(iter(usages.values())).layer_indices) if usages else 0
        return [dict.fromkeys(names) for _ in range(layers)]
    found = mutual_information(np.stack([usage.blocks.sum(1) for usage in read], axis=1))
    maximum = float(np.log2(min(len(read), read[0].groups.num_experts)))
    rows = zip(found.tolist(), [maximum] * len(found), _floor(read).tolist(), strict=True)
    return [dict(zip(names, row, strict=True)) for row in rows]


def _floor(usages: Sequence[Usage]) -> Float[np.ndarray, " L"]:
    """Return what 95 % of the permutations stay under, for every layer."""
    held = [usage.blocks.any((0, 2)) for usage in usages]  # the blocks that hold pairs, P in all
    load = np.concatenate([usage.blocks[:, here] for usage, here in zip(usages, held, strict=True)], axis=1)
    documents = np.concatenate([usage.documents[here] for usage, here in zip(usages, held, strict=True)])[:, None]
    member = np.repeat(np.eye(len(usages)), [here.sum() for here in held], axis=1)  # (D, P)
    pairs = load.sum(-1, keepdims=True)
    shares = load / np.maximum(pairs, 1)
    mean = (documents * shares).sum(1, keepdims=True) / documents.sum()
    scale = np.sqrt(documents)
    deviation, generator = (shares - mean) * scale, np.random.default_rng(0)
    found = []
    for _ in range(PERMUTATIONS):
        moved = mean + deviation[:, generator.permutation(len(documents))] / scale
        found.append(mutual_information(np.maximum(member @ (pairs * moved), 0)))
    return np.quantile(found, 0.95, axis=0)
