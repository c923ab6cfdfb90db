"""Held-out loss per domain: pure cross-entropy, never with auxiliary terms.

A text is read as windows that overlap by one token, so every token is predicted exactly once; the end-of-document token
stands before the first one, as it does in training between documents. The last window is padded, and its padding masked
out of the loss and of the routing. Bits per byte are the nats of all tokens (end-of-document tokens included) / ln 2 /
the UTF-8 bytes of the text they encode, so that tokenizers compare.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional as F

from himoe.data import Tokenizer
from himoe.errors import HimoeError


@dataclass(frozen=True)
class Text:
    """Token ids of one domain and the number of UTF-8 bytes they encode."""

    tokens: np.ndarray
    num_bytes: int

    @classmethod
    def encode(cls, documents: Sequence[str], tokenizer: Tokenizer) -> "Text":
        """Encode documents, each followed by the end-of-document token, as a token file holds them."""
        ids = [np.array([*ids, tokenizer.end_of_document]) for ids in tokenizer.encode_batch(documents)]
        return cls(np.concatenate(ids), sum(len(document.encode()) for document in documents))

    def prefix(self, num_tokens: int | None, byte_lengths: np.ndarray) -> "Text":
        """Return the first `num_tokens` tokens, all for None; `byte_lengths[id]` are the bytes of each token.

        >>> Text(np.array([1, 0, 1]), 5).prefix(2, np.array([1, 2])).num_bytes
        3
        """
        if num_tokens is None or num_tokens >= len(self.tokens):
            return self
        first = self.tokens[:num_tokens]
        return Text(first, int(byte_lengths[first].sum()))


@dataclass(frozen=True)
class Score:
    """Total nats over a text.

    >>> score = Score(nats=2 * math.log(2), tokens=2, num_bytes=1)
    >>> round(score.perplexity, 12), score.bits_per_byte
    (2.0, 2.0)
    """

    nats: float
    tokens: int
    num_bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(min(self.loss, 700.0))  # beyond it there is no finite number, and JSON has no other

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of the text."""
        return self.nats / math.log(2) / self.num_bytes

    def __add__(self, other: "Score") -> "Score":
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.num_bytes + other.num_bytes)

    def record(self) -> dict[str, float]:
        """Return what the run folder stores of a domain."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.num_bytes,
        }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    text: Text,
    *,
    start_token: int,
    seq_len: int,
    batch_size: int,
    precision: str = "fp32",
) -> Score:
    """Score one text in eval mode; the model's mode is restored, no state and no generator moves.

    Args:
        model: `(token_ids (B, S), mask (B, S) or None) → (logits (B, S, V), routings)`.
        text: what to predict.
        start_token: the id before the first token, the end-of-document token.
        seq_len: S, tokens per window.
        batch_size: B, windows per forward pass.
        precision: "fp32", or "bf16" for bf16 autocast.

    Raises HimoeError when the loss is not finite.
    """
    device, was_training = next(model.parameters()).device, model.training
    nats = torch.zeros((), dtype=torch.float64, device=device)
    model.eval()
    try:
        for first in range(0, len(text.tokens), batch_size * seq_len):
            inputs, targets, mask = _windows(text.tokens, first, batch_size * seq_len, start_token, seq_len)
            targets = targets.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits, _ = model(inputs.to(device), None if mask is None else mask.to(device))
            nats += F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
    finally:
        model.train(was_training)
    score = Score(float(nats), len(text.tokens), text.num_bytes)
    if not math.isfinite(score.nats):
        raise HimoeError(f"the held-out loss is {score.nats}: the weights have diverged; lower train.learning_rate")
    return score


def _windows(
    tokens: np.ndarray, first: int, count: int, start_token: int, seq_len: int
) -> tuple[Int[Tensor, "B S"], Int[Tensor, "B S"], Bool[Tensor, "B S"] | None]:
    """Return inputs, targets and mask for the prediction of tokens `first` … `first + count − 1` (or the end)."""
    targets = torch.from_numpy(tokens[first : first + count].astype(np.int64))
    previous = tokens[max(0, first - 1) : first + len(targets) - 1].astype(np.int64)
    inputs = torch.from_numpy(previous if first else np.concatenate([[start_token], previous]))
    padding = -len(targets) % seq_len
    mask = F.pad(torch.ones_like(targets, dtype=torch.bool), (0, padding)).view(-1, seq_len) if padding else None
    inputs = F.pad(inputs, (0, padding), value=start_token).view(-1, seq_len)
    return inputs, F.pad(targets, (0, padding), value=-100).view(-1, seq_len), mask


def evaluate_domains(model: nn.Module, texts: Mapping[str, Text], **how: Any) -> dict[str, Any]:
    """Score every domain; return `{"domains": {name: record}, "loss", "bits_per_byte"}`, the last two over all text.

    `how` goes to `evaluate`.
    """
    scores = {name: evaluate(model, text, **how) for name, text in texts.items()}
    total = sum(scores.values(), Score(0.0, 0, 0))
    return {
        "domains": {name: score.record() for name, score in scores.items()},
        "loss": total.loss,
        "bits_per_byte": total.bits_per_byte,
    }
