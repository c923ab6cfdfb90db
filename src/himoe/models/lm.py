"""A decoder language model whose feed-forward layers are any pattern of dense and MoE layers.

Pre-norm blocks: x + attention(norm(x)), then x + feed_forward(norm(x)); a final norm and the head.

Initialisation: every matrix and embedding is normal with standard deviation 0.02 (the gate too), the matrices that
write into the residual stream (attention output, every down projection) 0.02/√(2·layers), norms and learned scales 1.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from himoe.errors import ConfigError
from himoe.functional.cross_entropy import linear_cross_entropy
from himoe.functional.masked import masked_mean
from himoe.functional.precision import accumulation_dtype
from himoe.models.attention import Attention, visible
from himoe.models.cache import Buffer, KVCache
from himoe.models.recompute import CONTEXTS, autocast_without_cache, silence_false_alarm
from himoe.nn import MoE
from himoe.types import Routing

INIT_STD = 0.02
RESIDUAL_WRITERS = ("out_proj.weight", "down_proj.weight", "down_proj")


class Block(nn.Module):
    """One layer: attention, then a dense or MoE feed-forward, each on the normalised residual stream."""

    def __init__(self, dim: int, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=1e-6)
        self.attention = attention
        self.feed_forward_norm = nn.RMSNorm(dim, eps=1e-6)
        self.feed_forward = feed_forward
        self.recompute = "none"

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        seen: Bool[Tensor, "B 1 S N"] | None,
        mask: Bool[Tensor, "B S"] | None,
        token_ids: Int[Tensor, "B S"],
        cache: tuple[Buffer, Buffer] | None = None,
    ) -> tuple[Float[Tensor, "B S D"], Routing | None]:
        """Return the new residual stream and the routing, None for a dense layer."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._run(x, seen, mask, token_ids, cache)
        keep = CONTEXTS[self.recompute]
        return checkpoint(self._run, x, seen, mask, token_ids, use_reentrant=False, context_fn=keep)  # type: ignore[return-value]

    def _run(
        self,
        x: Tensor,
        seen: Tensor | None,
        mask: Tensor | None,
        token_ids: Tensor,
        cache: tuple[Buffer, Buffer] | None = None,
    ) -> tuple[Tensor, Routing | None]:
        x = x + self.attention(self.attention_norm(x), seen, cache)
        normed = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, MoE):
            y, routing = self.feed_forward(normed, mask, token_ids=token_ids)
            return x + y, routing
        return x + self.feed_forward(normed), None


class DecoderLM(nn.Module):
    """A causal language model, as long as its feed-forward layers are causal.

    What `himoe train` refuses is not refused here: a router that lets later tokens change earlier ones can be studied.
    `himoe.nn.non_causal_parts(model)` names the parts that say so, `himoe.testing.check_causality` measures it.

    Args:
        vocab_size: V.
        dim: D.
        num_layers: L.
        num_heads: query heads.
        num_kv_heads: key and value heads; default `num_heads`.
        feed_forward: layer index → module: an `MoE`, or any (B, S, D) → (B, S, D) network such as `SwiGLU`.
        tie_embeddings: use the input embedding as the head.
        qk_norm: RMS-normalise queries and keys.
        rope_theta: base of the rotary frequencies.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        feed_forward: Callable[[int], nn.Module],
        num_kv_heads: int | None = None,
        tie_embeddings: bool = True,
        qk_norm: bool = True,
        rope_theta: float = 10_000.0,
    ) -> None:
        super().__init__()
        if vocab_size < 1 or num_layers < 1:
            raise ConfigError(f"DecoderLM: vocab_size = {vocab_size} and num_layers = {num_layers} must be ≥ 1")
        self.embedding = nn.Embedding(vocab_size, dim)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.blocks = nn.ModuleList(
            Block(
                dim,
                Attention(dim, num_heads, kv_heads, qk_norm=qk_norm, rope_theta=rope_theta),
                feed_forward(layer),
            )
            for layer in range(num_layers)
        )
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.tie_embeddings = tie_embeddings
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set all parameters and balancer states to their start, also after `to_empty` on the meta device."""
        if self.tie_embeddings:
            self.head.weight = self.embedding.weight  # `to_empty` gives each module its own, which unties them
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and callable(reset):
                reset()
        residual_std = INIT_STD / math.sqrt(2 * len(self.blocks))
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                writes_residual = name.endswith(RESIDUAL_WRITERS)
                nn.init.normal_(parameter, std=residual_std if writes_residual else INIT_STD)

    def forward(
        self,
        token_ids: Int[Tensor, "B S"],
        mask: Bool[Tensor, "B S"] | None = None,
        *,
        document_ids: Int[Tensor, "B S"] | None = None,
        cache: KVCache | None = None,
        targets: Int[Tensor, "B S"] | None = None,
    ) -> tuple[Float[Tensor, "B S V"] | Float[Tensor, ""], list[Routing]]:
        """Predict each next token.

        Args:
            token_ids: (B, S).
            mask: (B, S) True for real tokens; padding, before or behind the text, is neither attended to nor routed.
            document_ids: (B, S) equal for the tokens of one document, which see each other and nothing else. None:
                every row is one document. Losses per sequence are per row all the same.
            cache: what earlier calls read of the same rows; `token_ids` go on from there, and are added to it.
            targets: (B, S) the token that follows each real one. The model then gives its mean cross-entropy in place
                of logits. Those of a plain head never exist as a whole (`linear_cross_entropy`), nor do its hooks run.

        Returns:
            logits (B, S, V), or with targets the loss, and one `Routing` per MoE layer, in layer order.

        Raises:
            ConfigError: shapes that differ, a mask that is not bool, or a cache in training mode or of another model.
        """
        for name, value in (("mask", mask), ("document_ids", document_ids), ("targets", targets)):
            if value is not None and value.shape != token_ids.shape:
                raise ConfigError(
                    f"DecoderLM: {name} has shape {tuple(value.shape)}, token_ids {tuple(token_ids.shape)}"
                )
        if mask is not None and mask.dtype != torch.bool:
            raise ConfigError(f"DecoderLM: mask is {mask.dtype}, must be torch.bool, True for real tokens")
        if cache is not None and cache.num_layers != len(self.blocks):
            raise ConfigError(
                f"DecoderLM: the cache is for {cache.num_layers} layers, the model has {len(self.blocks)}"
            )
        if cache is not None and (self.training or torch.is_grad_enabled()):
            raise ConfigError("DecoderLM: a cache is for reading on, not for training; use eval() and torch.no_grad()")
        first = 0 if cache is None else cache.length
        known = (mask, document_ids) if cache is None else cache.remember(mask, document_ids)
        seen = visible(*known, length=first + token_ids.shape[1], first=first, device=token_ids.device)
        x = self.embedding(token_ids)
        routings: list[Routing] = []
        trains = self.training and torch.is_grad_enabled()
        with autocast_without_cache() if self.recompute != "none" else nullcontext():
            for layer, block in enumerate(self.blocks):
                run = block if trains else block._call_impl  # the latter passes by what `compile_blocks` compiled
                x, routing = run(x, seen, mask, token_ids, None if cache is None else cache.layer(layer))
                if routing is not None:
                    routings.append(routing)
        x = self.norm(x)
        return (self.head(x) if targets is None else self._loss(x, targets, mask)), routings

    def _loss(self, x: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        mask = None if mask is None else mask.flatten()
        if type(self.head) is nn.Linear and self.head.bias is None:
            return linear_cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten(), mask)
        targets = targets.flatten() if mask is None else targets.flatten().where(mask, 0)
        logits = self.head(x).flatten(0, 1)
        nats = F.cross_entropy(logits.to(accumulation_dtype(logits.dtype)), targets, reduction="none")
        return masked_mean(nats, mask)

    @property
    def recompute(self) -> str:
        """How much of the forward pass is computed again in backward: `none`, `selective` or `full`; can be set."""
        return self.blocks[0].recompute  # type: ignore[return-value]

    @recompute.setter
    def recompute(self, mode: str) -> None:
        if mode not in ("none", *CONTEXTS):
            raise ConfigError(f"recompute = {mode!r} must be none, {' or '.join(CONTEXTS)}")
        for block in self.blocks:
            block.recompute = mode  # type: ignore[assignment]

    def compile_blocks(self, **options: Any) -> None:
        """Compile every layer for training, in place: names in the state dict stay, checkpoints are interchangeable.

        In eval mode or without gradients the layers run as they are, so a text's score is that of the uncompiled
        model to the last bit, and evaluation's other shapes compile nothing. A part that torch cannot compile runs
        as it is too; with recompute, the whole layer does.

        Args:
            **options: of `torch.compile`.
        """
        silence_false_alarm()
        for block in self.blocks:
            block.compile(**options)

    def moe_layer_indices(self) -> list[int]:
        """Return which layers are MoE, in the order of the routings."""
        return [i for i, block in enumerate(self.blocks) if isinstance(block.feed_forward, MoE)]
