"""`replay`: experts that are given, such as those of an earlier run, to compare what else differs.

Bind them with `functools.partial(replay, expert_ids=…, selected=…)`. They are tensors, so a configuration cannot name
them. The scores still give the weights, and padding is left out by the router as ever.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from himoe.errors import ConfigError
from himoe.functional.selection.base import Selection, all_selected, refuse
from himoe.types import RouterContext


def replay(
    scores: Float[Tensor, "T E"],
    context: RouterContext,  # noqa: ARG001
    *,
    expert_ids: Int[Tensor, "T K"],
    selected: Bool[Tensor, "T K"] | None = None,
) -> Selection:
    """Experts given from outside, whatever the scores.

    Args:
        scores: (T, E); only its shape matters.
        context: unused.
        expert_ids: (T, K) int64, each in 0 … E-1, also in places that are not selected.
        selected: (T, K) which places hold a choice; default all.

    Raises:
        ConfigError: shapes, dtypes or ids that do not fit. On a GPU, and in compiled code, an id out of range fails as
            a device assertion instead, since the host does not wait to look at it.
    """
    num_tokens, num_experts = scores.shape
    if expert_ids.ndim != 2 or len(expert_ids) != num_tokens or expert_ids.dtype != torch.int64:
        refuse(
            "replay",
            f"expert_ids is {expert_ids.dtype} {tuple(expert_ids.shape)}, must be torch.int64 (T, K) with T = "
            f"{num_tokens}, the tokens of this call",
        )
    if selected is not None and (selected.shape != expert_ids.shape or selected.dtype != torch.bool):
        refuse(
            "replay",
            f"selected is {selected.dtype} {tuple(selected.shape)}, must be torch.bool {tuple(expert_ids.shape)}",
        )
    _check_range(expert_ids, num_experts)
    expert_ids = expert_ids.to(scores.device)
    return all_selected(expert_ids) if selected is None else (expert_ids, selected.to(scores.device))


# It cannot be asked for one token, since it has T to give.
replay.places = lambda expert_ids, **_: expert_ids.shape[-1]  # type: ignore[attr-defined]


def _check_range(expert_ids: Int[Tensor, "T K"], num_experts: int) -> None:
    message = f"replay: expert_ids must lie between 0 and {num_experts - 1} (num_experts = {num_experts})"
    inside = ((expert_ids >= 0) & (expert_ids < num_experts)).all()
    if torch.compiler.is_compiling():
        torch.ops.aten._assert_async.msg(inside, message)
        return
    try:
        torch.ops.aten._assert_async.msg(inside, message)
    except RuntimeError as error:
        raise ConfigError(message) from error
