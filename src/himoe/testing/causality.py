"""The suffix test: later tokens of a text never change a language model's logits before them, in training mode too.

A router can break this where attention does not: by statistics of the batch that it routes, by choosing tokens for
experts instead of experts for tokens, by places that later tokens take. Such a model sees its future in training, and
its loss is too good. `suffix_test` measures, `check_causality` raises.

For several cuts c and rows r, the tokens of row r from place c on are exchanged, all others stay, and the logits of row
r before c are compared. That row alone: what other texts of a batch do to it, as under a capacity limit, is another
question. Both forward passes draw the same random numbers, so noise stays. The model is compared in fp64 (a copy, the
model itself is not touched), where sums in another order differ by some 1e-15 of their size, and leaks by far more.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from himoe.errors import ConfigError
from himoe.nn import MoE, non_causal_parts
from himoe.types import Routing

TOLERANCE = 1e-11
"""Largest change of an earlier logit that counts as rounding, as a share of the largest logit, in fp64."""

MODES = ("training", "eval")


@dataclass(frozen=True)
class Suffix:
    """What exchanging the tokens from one place on did, over all rows.

    Attributes:
        mode: "training" or "eval".
        cut: first place whose token was exchanged.
        change: largest change of a logit before it in the same row, as a share of the largest logit.
        row: the row where that was; None where nothing changed.
        position: first place before the cut whose logits changed there.
        layer: name of the first MoE layer that routed a token before the cut otherwise; None for none.
        what: of that layer: "experts" (others were chosen), "kept pairs" (others were dropped) or "weights".
        after: largest change from the cut on, so that the test is seen to reach the model.
    """

    mode: str
    cut: int
    change: float = 0.0
    after: float = 0.0
    row: int | None = None
    position: int | None = None
    layer: str | None = None
    what: str | None = None


@dataclass(frozen=True)
class SuffixTest:
    """What the suffix test found.

    Attributes:
        suffixes: one per mode and cut.
        tolerance: the largest change that is taken for rounding.
        rows: B, rows of the batch, each tried.
        length: S, tokens of a row.
        labelled: parts of the model that say they are not causal, with their reasons.
    """

    suffixes: Sequence[Suffix]
    tolerance: float
    rows: int
    length: int
    labelled: Mapping[str, str]

    @property
    def causal(self) -> bool:
        """True where no earlier logit changed in any mode."""
        return not self.leaks

    @property
    def leaks(self) -> list[Suffix]:
        """The suffixes that changed earlier logits."""
        return [suffix for suffix in self.suffixes if suffix.row is not None]


def check_causality(model: nn.Module, token_ids: Int[Tensor, "B S"], **options: Any) -> None:
    """Raise AssertionError, naming place and layer, unless no later token changes an earlier logit.

    Args:
        model: a language model, anybody's: token ids (B, S) → logits (B, S, V), alone, first of a tuple, or `.logits`.
        token_ids: (B, S) texts to try it with; random ids do.
        **options: of `suffix_test`.

    >>> from himoe import DecoderLM, SwiGLUExperts, MoE, presets
    >>> moe = lambda _: MoE(presets.hi_moe(8, 8, 4, num_groups=4), SwiGLUExperts(8, 8, 8))
    >>> model = DecoderLM(vocab_size=20, dim=8, num_layers=2, num_heads=2, feed_forward=moe)
    >>> check_causality(model, torch.randint(20, (2, 9)))
    """
    test = suffix_test(model, token_ids, **options)
    if test.leaks:
        raise AssertionError(f"{type(model).__name__}: {describe(test.leaks[0])}")


def describe(leak: Suffix) -> str:
    """Return in a sentence what a leaking suffix did."""
    where = f"; first in {leak.layer}, whose {leak.what} changed" if leak.layer else "; no router decided otherwise"
    return (
        f"in {leak.mode} mode, exchanging the tokens from place {leak.cut} on changed the logits at place "
        f"{leak.position}, by up to {leak.change:.1e} of the largest{where}"
    )


@torch.no_grad()
def suffix_test(
    model: nn.Module,
    token_ids: Int[Tensor, "B S"],
    *,
    cuts: Sequence[int] | None = None,
    modes: Sequence[str] = MODES,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    tolerance: float = TOLERANCE,
    progress: Callable[[float], None] = lambda _: None,
) -> SuffixTest:
    """Exchange later tokens of each row, at several cuts, and see what happens before them.

    Args:
        model: as for `check_causality`; it is copied, and stays as it is.
        token_ids: (B, S), S ≥ 2. Only ids that stand here are put in others' places.
        cuts: places from which on the tokens are exchanged, each in 1 … S−1; default five, the first and the last.
        modes: any of "training" and "eval".
        seed: of the exchanged tokens, and of the noise in every forward pass. No global generator moves.
        dtype: what the copy computes in. In fp32, which some kernels need, a tolerance of 1e-4 is rounding.
        tolerance: see `TOLERANCE`.
        progress: is called with the done share.

    Raises:
        ConfigError: ids, cuts or modes that cannot be used, or a model of which nothing can be told: it answers the
            same text differently when asked again, or any text alike, or not in numbers.
    """
    cuts = default_cuts(token_ids.shape[-1]) if cuts is None else list(cuts)
    _check(token_ids, cuts, modes)
    others = _others(token_ids, seed)
    runner = _Runner(model, seed, dtype)
    suffixes: list[Suffix] = []
    for mode in modes:
        runner.model.train(mode == "training")
        before = runner(token_ids)
        if (again := before.change(runner(token_ids), slice(None))) > tolerance:
            raise ConfigError(
                f"the model's logits differ by {again:.1e} when it reads the same text twice in {mode} mode: its "
                "forward pass writes state, or draws noise that torch.manual_seed does not reach"
            )
        for cut in cuts:
            tried: list[Suffix] = []
            for row in range(len(token_ids)):
                changed = token_ids.clone()
                changed[row, cut:] = others[row, cut:]
                tried.append(_try(runner, before, changed, Suffix(mode, cut), row, tolerance))
            worst = max(tried, key=lambda suffix: suffix.change)
            suffixes.append(replace(worst, after=max(suffix.after for suffix in tried)))
            progress(len(suffixes) / (len(cuts) * len(modes)))
    if not any(suffix.after > tolerance for suffix in suffixes):
        raise ConfigError("exchanging tokens changed no logit at all, not even their own: does the model read them?")
    return SuffixTest(suffixes, tolerance, *token_ids.shape, labelled=non_causal_parts(model))


def default_cuts(length: int) -> list[int]:
    """Return five cuts over a text, fewer where it is short.

    >>> default_cuts(64), default_cuts(3)
    ([1, 16, 32, 48, 63], [1, 2])
    """
    return sorted({min(max(length * quarter // 4, 1), length - 1) for quarter in range(5)})


@dataclass(frozen=True)
class _Answer:
    """The logits of a batch, and what every MoE layer decided, by name."""

    logits: Tensor
    routings: Mapping[str, Routing]

    def change(self, other: "_Answer", *places: Any) -> float:
        """Return the largest change of a logit there, as a share of the largest."""
        scale = self.logits.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        part = (self.logits - other.logits)[places].abs()
        return float(part.max() / scale) if part.numel() else 0.0


class _Runner:
    """A copy of the model whose routings are noted down."""

    def __init__(self, model: nn.Module, seed: int, dtype: torch.dtype) -> None:
        self.model, self.seed = copy.deepcopy(model).to(dtype), seed
        self._routings: dict[str, Routing] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, MoE):
                module.register_forward_hook(self._note(name))

    def _note(self, name: str) -> Callable[..., None]:
        def note(_module: nn.Module, _given: Any, returned: tuple[Tensor, Routing]) -> None:
            self._routings[name] = returned[1]

        return note

    def __call__(self, token_ids: Tensor) -> _Answer:
        self._routings.clear()
        with _same_noise(self.seed):
            given = self.model(token_ids)
        logits = getattr(given, "logits", given[0] if isinstance(given, tuple) else given)
        if not logits.isfinite().all():
            raise ConfigError("the model's logits are not all finite numbers; nothing can be told of it")
        return _Answer(logits.double(), dict(self._routings))


@contextmanager
def _same_noise(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _others(token_ids: Tensor, seed: int) -> Tensor:
    """Return ids of the text at random, every one another than what stands in its place."""
    known = token_ids.unique()
    place = torch.searchsorted(known, token_ids)
    generator = torch.Generator().manual_seed(seed)
    move = torch.randint(1, max(len(known), 2), token_ids.shape, generator=generator).to(token_ids.device)
    return known[(place + move) % len(known)]


def _try(runner: _Runner, before: _Answer, changed: Tensor, suffix: Suffix, row: int, tolerance: float) -> Suffix:
    """Read a text whose row is another from the cut on; return the suffix with what that did."""
    cut = suffix.cut
    after = runner(changed)
    suffix = replace(
        suffix, change=before.change(after, row, slice(cut)), after=before.change(after, row, slice(cut, None))
    )
    if suffix.change <= tolerance:
        return suffix
    position = next(place for place in range(cut) if before.change(after, row, place) > tolerance)
    layer, what = _first_layer(before, after, slice(row * changed.shape[1], row * changed.shape[1] + cut), tolerance)
    return replace(suffix, row=row, position=position, layer=layer, what=what)


def _first_layer(before: _Answer, after: _Answer, tokens: slice, tolerance: float) -> tuple[str | None, str | None]:
    """Return the name of the first layer that routed these tokens otherwise, and what it did otherwise."""
    for name, routing in before.routings.items():
        now = after.routings[name]
        if not torch.equal(_chosen(routing, tokens, "selected"), _chosen(now, tokens, "selected")):
            return name, "experts"
        if not torch.equal(_chosen(routing, tokens, "kept"), _chosen(now, tokens, "kept")):
            return name, "kept pairs"
        if (routing.weights - now.weights)[tokens].abs().max() > tolerance:
            return name, "weights"
    return None, None


def _chosen(routing: Routing, tokens: slice, which: str) -> Tensor:
    """Return (T, E), whether each of the tokens has each expert."""
    pairs = getattr(routing, which)[tokens]
    counts = torch.zeros(len(pairs), routing.num_experts, dtype=torch.int64, device=pairs.device)
    return counts.scatter_add_(-1, routing.expert_ids[tokens], pairs.long()) > 0


def _check(token_ids: Tensor, cuts: Sequence[int], modes: Sequence[str]) -> None:
    if token_ids.ndim != 2 or token_ids.shape[1] < 2 or not len(token_ids) or len(token_ids.unique()) < 2:
        raise ConfigError(
            f"suffix_test: token_ids {tuple(token_ids.shape)} must be (B, S) with S ≥ 2, and hold at least two ids"
        )
    if not cuts or any(not 1 <= cut < token_ids.shape[1] for cut in cuts):
        raise ConfigError(f"suffix_test: cuts = {list(cuts)} must each be between 1 and {token_ids.shape[1] - 1}")
    if not modes or not set(modes) <= set(MODES):
        raise ConfigError(f"suffix_test: modes = {list(modes)} must be some of {', '.join(MODES)}")
