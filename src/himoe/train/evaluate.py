"""Held-out loss per domain: pure cross-entropy, never with auxiliary terms.

A text is read as windows that overlap by one token, so every token is predicted exactly once; the end-of-document token
stands before the first one, as it does in training between documents. Attention stays inside a document unless training
let it cross. The last window is padded, and its padding masked out of the loss and of the routing. Bits per byte are
the nats of all tokens (end-of-document tokens included) / ln 2 / the UTF-8 bytes of the text they encode, so that
tokenizers compare.

A text may come piece by piece and be longer than memory: at most one batch of each domain waits.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from himoe.errors import DataError
from himoe.train.nonfinite import NonFiniteLossError, find_nonfinite
from himoe.train.scores import Buckets, Score, TextScore
from himoe.train.texts import Piece, Text, token_pieces
from himoe.train.usage import Usage, domain_information
from himoe.types import Routing


@dataclass(frozen=True)
class Reading:
    """How a text is read.

    Args:
        end_of_document: the id after every document, which also stands before the first token.
        seq_len: S, tokens per window.
        batch_size: B, windows per forward pass.
        precision: "fp32", or "bf16" for bf16 autocast.
        cross_documents: let attention see earlier documents of the same window.
        byte_lengths: (V,) UTF-8 bytes of every token, for bits per byte by context and by document length.
    """

    end_of_document: int
    seq_len: int
    batch_size: int
    precision: str = "fp32"
    cross_documents: bool = False
    byte_lengths: np.ndarray | None = None


def evaluate_domains(model: nn.Module, texts: Mapping[str, Text], reading: Reading) -> dict[str, Any]:
    """Score every domain in eval mode; return what an evaluation line of a run folder holds (docs/run-folder.md).

    `model` is `(token_ids (B, S), mask (B, S) or None, document_ids=(B, S) or None) → (logits (B, S, V), routings)`.
    Its mode is restored, no state and no generator moves. Raises NonFiniteLossError when the loss is not finite.
    """
    return _Evaluation(model, reading).read(token_pieces(texts)).record()


def evaluate_pieces(
    model: nn.Module, pieces: Iterable[Piece], reading: Reading, new_usage: Callable[[], Usage]
) -> dict[str, Any]:
    """Score text as it comes, its domains in any order, with all details: per domain and of the experts' use.

    Returns the dictionary of `evaluate_domains`, with `by_context`, `by_length` and `layers` in every domain, and
    `layers` for all of them together.
    """
    evaluation = _Evaluation(model, reading, new_usage).read(pieces)
    result = evaluation.record()
    for name, score in evaluation.scores.items():
        details = {"by_context": score.by_context.records(), "by_length": score.by_length.records()}
        result["domains"][name] |= {**details, "layers": evaluation.usages[name].records()}
    together = sum(evaluation.usages.values(), new_usage())
    information = domain_information(evaluation.usages)
    result["layers"] = [{**row, **more} for row, more in zip(together.records(), information, strict=True)]
    return result


class _Evaluation:
    """The domains of one evaluation."""

    def __init__(self, model: nn.Module, reading: Reading, new_usage: Callable[[], Usage] | None = None) -> None:
        self.model, self.reading, self.new_usage = model, reading, new_usage
        self.scores: dict[str, TextScore] = {}
        self.usages: dict[str, Usage] = {}

    @torch.no_grad()
    def read(self, pieces: Iterable[Piece]) -> "_Evaluation":
        windows: dict[str, _Windows] = {}
        was_training = self.model.training
        self.model.eval()
        try:
            for name, tokens, num_bytes in pieces:
                if name not in windows:
                    self.scores[name] = TextScore(self.reading.end_of_document, self.reading.byte_lengths)
                    if self.new_usage:
                        self.usages[name] = self.new_usage()
                    windows[name] = _Windows(self.model, self.reading, self.scores[name], self.usages.get(name))
                self.scores[name].num_bytes += num_bytes
                windows[name].add(tokens)
            for one in windows.values():
                one.finish()
        finally:
            self.model.train(was_training)
        if not self.scores:
            raise DataError("there is no text to score: every document is empty")
        return self

    def record(self) -> dict[str, Any]:
        scores = self.scores.values()
        total = sum((score.total for score in scores), Score(0.0, 0, 0))
        return {
            "domains": {name: score.total.record() for name, score in self.scores.items()},
            "loss": total.loss,
            "bits_per_byte": total.bits_per_byte,
            "by_context": sum((score.by_context for score in scores), Buckets()).records(),
            "by_length": sum((score.by_length for score in scores), Buckets()).records(),
        }


class _Windows:
    """Cuts one domain's tokens into batches of windows and adds what the model makes of them to its score."""

    def __init__(self, model: nn.Module, reading: Reading, score: TextScore, usage: Usage | None) -> None:
        self.model, self.reading, self.score, self.usage = model, reading, score, usage
        self.device = next(model.parameters()).device
        self._rest = np.empty(0, dtype=np.int64)
        self._previous = reading.end_of_document
        self._documents = -1  # the number of the last one

    def add(self, tokens: np.ndarray) -> None:
        """Take the next tokens; score every batch that is full."""
        tokens = np.concatenate([self._rest, tokens])
        size = self.reading.batch_size * self.reading.seq_len
        full = len(tokens) // size * size
        for start in range(0, full, size):
            self._score(tokens[start : start + size])
        self._rest = tokens[full:]

    def finish(self) -> None:
        """Score the tokens of the last, incomplete batch."""
        if len(self._rest):
            self._score(self._rest)
        self._rest = self._rest[:0]

    def _score(self, targets: np.ndarray) -> None:
        end, seq_len = self.reading.end_of_document, min(self.reading.seq_len, len(targets))
        inputs = np.concatenate([[self._previous], targets[:-1]])
        self._previous = int(targets[-1])
        real = np.arange(len(inputs) + -len(inputs) % seq_len) < len(inputs)
        inputs = np.pad(inputs, (0, len(real) - len(inputs)), constant_values=end)
        starts = (inputs == end) & real  # an end, as input, opens the document that it is followed by
        windows = [values.reshape(-1, seq_len) for values in (inputs, real, starts)]
        nats, routings = self._predict(targets, *windows)
        if not math.isfinite(nats.sum()):
            raise NonFiniteLossError(
                float(nats.sum()), find_nonfinite(self.model, lambda: self._predict(targets, *windows))
            )
        self.score.add(targets, nats, _context(starts.reshape(-1, seq_len)).ravel()[: len(targets)])
        if self.usage:
            numbers = self._documents + np.cumsum(starts)
            self.usage.observe(routings, torch.from_numpy(numbers).to(self.device))
            self._documents = int(numbers[-1])

    def _predict(
        self, targets: np.ndarray, inputs: np.ndarray, real: np.ndarray, starts: np.ndarray
    ) -> tuple[np.ndarray, list[Routing]]:
        """Return the nats (N,) of N targets, and the routings, for windows (B, S)."""
        token_ids, mask, starts_here = (torch.from_numpy(values).to(self.device) for values in (inputs, real, starts))
        one_document = self.reading.cross_documents or not starts[:, 1:].any()
        document_ids: Tensor | None = None if one_document else starts_here.cumsum(1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.reading.precision == "bf16"):
            logits, routings = self.model(token_ids, None if real.all() else mask, document_ids=document_ids)
        logits = logits.flatten(0, 1)[: len(targets)].float()
        nats = F.cross_entropy(logits, torch.from_numpy(targets).to(self.device), reduction="none")
        return nats.double().cpu().numpy(), routings


def _context(starts: np.ndarray) -> np.ndarray:
    """Return how many tokens of the predicted token's document stand before it in its window, for windows (B, S).

    `starts` marks the inputs that open a document; they are no tokens of it.
    """
    places = np.arange(starts.shape[1])
    return places - np.maximum.accumulate(np.where(starts, places, -1), axis=1)
