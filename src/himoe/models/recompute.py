"""Activation recompute: a layer keeps little of its forward pass and runs again in backward. Slower, less memory.

| mode | kept of each layer |
|---|---|
| `none` | everything that its gradients need |
| `selective` | the results of matrix products, attention and the expert MLP: little is computed twice |
| `full` | its input: almost all of the forward pass is computed twice |

Every mode keeps the routing (`himoe::saved_routing`): recomputed logits may differ in their last bits, and the experts
that a token is sent to must not.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts

aten = torch.ops.aten
ROUTING = {torch.ops.himoe.saved_routing.default}
EXPENSIVE = ROUTING | {
    torch.ops.himoe.expert_mlp.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.linear.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
}


def _keep_expensive(_: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:  # noqa: ARG001
    return CheckpointPolicy.MUST_SAVE if operator in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_routing(_: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:  # noqa: ARG001
    return CheckpointPolicy.MUST_SAVE if operator in ROUTING else CheckpointPolicy.PREFER_RECOMPUTE


def _selective() -> Any:
    return create_selective_checkpoint_contexts(_keep_expensive)


def _full() -> Any:
    return create_selective_checkpoint_contexts(_keep_routing)


CONTEXTS: dict[str, Callable[[], Any]] = {"selective": _selective, "full": _full}


@contextmanager
def autocast_without_cache() -> Iterator[None]:
    """Let autocast cast every weight anew inside.

    Its cache may hold a weight in the first forward pass and no more in the second, which then would run other
    operators than the first.
    """
    was = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was)


def silence_false_alarm() -> None:
    """Hide torch's advice, once per process, that a compiled checkpoint must not change a kept result in place.

    Nothing here does: what a layer writes in place are index tensors of its own, which no mode keeps.
    """
    log = logging.getLogger("torch._higher_order_ops.wrap")
    log.addFilter(_is_no_false_alarm)  # adding it again changes nothing


def _is_no_false_alarm(record: logging.LogRecord) -> bool:
    return "context_fn is passed to torch.utils.checkpoint under torch.compile" not in record.getMessage()
