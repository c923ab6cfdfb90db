"""Text from a language model, token by token: several prompts at once, each as if it were alone.

Prompts of different lengths stand in one batch with padding in front. A prompt's random numbers depend on the seed, on
the prompt, and on how many times the same prompt stands before it, never on what else is in the batch.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from operator import index

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from himoe.errors import ConfigError, HimoeError, HimoeWarning
from himoe.models.cache import KVCache
from himoe.models.lm import DecoderLM
from himoe.nn import Capacity

Tokens = list[int | None]
CONTEXT = 8  # tokens before the new ones that a tokenizer may look at


def generate(
    model: DecoderLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop: Collection[int] = (),
    seed: int = 0,
) -> Iterator[Tokens]:
    """Continue every prompt; yields, at each step, the new token of each, None for those that have ended.

    The model may go on beyond the length that it was trained on: rotary positions have no end, but nobody promises
    that what it writes there is good.

    Args:
        model: in eval mode.
        prompts: token ids, at least one each; a document starts with the end-of-document token, as in training.
        max_new_tokens: most tokens for each prompt.
        temperature: divides the logits; 0 takes the likeliest token every time.
        top_k: draw from that many likeliest tokens. None: from all.
        top_p: draw from the fewest likeliest tokens whose probabilities reach this sum.
        stop: tokens that end a prompt's text; they are yielded as its last. Give it the end-of-document token: what
            would follow is another document, which sees this one here, and in training does not.
        seed: the same seed gives the same text.

    Raises:
        ConfigError: a prompt or an option that cannot work; at the call, not at the first step.

    Warns:
        HimoeWarning: a capacity limit that drops in eval mode.

    >>> from himoe.nn import SwiGLU
    >>> model = DecoderLM(vocab_size=9, dim=8, num_layers=1, num_heads=2, feed_forward=lambda _: SwiGLU(8, 16)).eval()
    >>> len(list(generate(model, [[8, 1, 2], [8]], max_new_tokens=4)))
    4
    """
    vocab_size = model.embedding.num_embeddings
    prompts = [[*map(index, prompt)] for prompt in prompts]  # arrays and tensors too
    _check_prompts(prompts, vocab_size)
    _check_options(max_new_tokens, temperature, top_k, top_p, seed)
    if model.training:
        raise ConfigError("generate: the model is in training mode; call model.eval() first")
    if any(isinstance(module, Capacity) and module.drop_in_eval for module in model.modules()):
        warnings.warn(
            "generate: Capacity(drop_in_eval=True) drops other pairs when text is read token by token than when it is "
            "read at once; set drop_in_eval = False",
            HimoeWarning,
            stacklevel=2,
        )
    draw = _Sampler(prompts, seed, temperature, top_k, top_p)
    return _continue(model, prompts, max_new_tokens, draw, frozenset(stop))


@torch.no_grad()
def _continue(
    model: DecoderLM, prompts: Sequence[Sequence[int]], steps: int, draw: "_Sampler", stop: frozenset[int]
) -> Iterator[Tokens]:
    device = model.embedding.weight.device
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(prompt)) + [*prompt] for prompt in prompts]
    token_ids = torch.tensor(rows, device=device)
    before = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    mask = torch.arange(longest, device=device) >= before[:, None] if len({*map(len, prompts)}) > 1 else None
    cache, running = KVCache(len(model.blocks)), [True] * len(prompts)
    for _ in range(steps):
        logits, _ = model(token_ids, mask, cache=cache)
        drawn = draw(logits[:, -1])
        tokens = drawn.tolist()
        yield [token if runs else None for token, runs in zip(tokens, running, strict=True)]
        running = [runs and token not in stop for token, runs in zip(tokens, running, strict=True)]
        if not any(running):
            return
        # A row that has ended is read on until the others have: nobody sees what it says.
        token_ids = drawn.to(device)[:, None]
        mask = None if mask is None else torch.ones_like(token_ids, dtype=torch.bool)


class _Sampler:
    """Draws one token per row, from that row's own random numbers."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], seed: int, temperature: float, top_k: int | None, top_p: float
    ) -> None:
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        before: Counter[tuple[int, ...]] = Counter()
        self.random: list[np.random.Generator] = []
        for prompt in map(tuple, prompts):
            self.random.append(np.random.default_rng([seed, before[prompt], *prompt]))
            before[prompt] += 1

    def __call__(self, logits: Float[Tensor, "B V"]) -> Int[Tensor, " B"]:
        logits = logits.cpu().double()
        if not logits.isfinite().all():
            raise HimoeError("generate: the model gives logits that are not finite: its weights have diverged")
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        likely, ids = logits.sort(descending=True, stable=True)
        probability = likely[:, : self.top_k].softmax(-1)
        before = probability.cumsum(-1) - probability
        reached = probability.where(before < self.top_p, 0).cumsum(-1)
        uniform = torch.tensor([[random.random()] for random in self.random], dtype=torch.float64)
        place = torch.searchsorted(reached, uniform * reached[:, -1:], right=True)
        # Rounding may take the largest uniform number past the last token that may be drawn.
        last = (reached < reached[:, -1:]).sum(-1, keepdim=True)
        return ids.gather(-1, place.minimum(last))[:, 0]


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    if not prompts:
        raise ConfigError("generate: there is no prompt; give at least one")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"generate: prompt {i} has no token; start it with the end-of-document token")
        if wrong := [token for token in prompt if not 0 <= token < vocab_size]:
            raise ConfigError(f"generate: prompt {i} holds token {wrong[0]}; the model knows 0 … {vocab_size - 1}")


def _check_options(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float, seed: int) -> None:
    allowed = {
        f"max_new_tokens = {max_new_tokens} must be ≥ 1": max_new_tokens >= 1,
        f"temperature = {temperature} must be ≥ 0 and finite; 0 takes the likeliest token": 0 <= temperature < math.inf,
        f"top_k = {top_k} must be ≥ 1": top_k is None or top_k >= 1,
        f"top_p = {top_p} must be above 0 and at most 1": 0 < top_p <= 1,
        f"seed = {seed} must be ≥ 0": seed >= 0,
    }
    if problems := [problem for problem, fine in allowed.items() if not fine]:
        raise ConfigError(f"generate: {'; '.join(problems)}")


class TextStream:
    """Turns tokens into text as they come, and holds back bytes that end inside a character until it is complete.

    Args:
        decode: token ids → text, with U+FFFD for bytes that are no character; a tokenizer's.
        before: tokens in front, which some tokenizers need to know whether a space follows; their text is not given.

    >>> stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"))
    >>> [stream.add(byte) for byte in "né".encode()], stream.end()
    (['n', '', 'é'], '')
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._tokens = [*before][-CONTEXT:]
        self._start, self._given = 0, len(self._tokens)

    def add(self, token: int) -> str:
        """Add a token; return the text that is complete with it."""
        self._tokens.append(token)
        known, text = self._decode(self._tokens[self._start : self._given]), self._decode(self._tokens[self._start :])
        if text.endswith("\N{REPLACEMENT CHARACTER}") or len(text) <= len(known):
            return ""
        self._start, self._given = self._given, len(self._tokens)
        return text[len(known) :]

    def end(self) -> str:
        """Return what was held back."""
        known, text = self._decode(self._tokens[self._start : self._given]), self._decode(self._tokens[self._start :])
        self._start = self._given = len(self._tokens)
        return text[len(known) :]
