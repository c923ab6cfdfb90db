"""The suffix test: what is causal passes; what leaks is found with its place and layer, in the mode where it does."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from himoe import Capacity, DecoderLM, Gate, MoE, MoEAdapter, Router, SwiGLUExperts, presets
from himoe.errors import ConfigError
from himoe.functional.selection import top_k
from himoe.nn import SwiGLU, non_causal_parts
from himoe.testing import check_causality, suffix_test
from himoe.testing.causality import default_cuts

pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")

V, D, E = 23, 8, 8


def texts(rows=2, length=10, seed=0):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


def model(router=None, *, dispatcher=None, first_dense=False, seed=0):
    """Two layers, weights so large that routing is uneven."""
    torch.manual_seed(seed)

    def feed_forward(layer):
        if first_dense and layer == 0:
            return SwiGLU(D, 8)
        built = router() if router else presets.switch(D, E, 2)
        return MoE(built, SwiGLUExperts(E, D, 6), dispatcher=dispatcher() if dispatcher else None)

    built = DecoderLM(vocab_size=V, dim=D, num_layers=2, num_heads=2, feed_forward=feed_forward)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    return built


def hi_moe(**options):
    return lambda: presets.hi_moe(D, E, 4, num_groups=4, **options)


def looking_ahead(scores, context, *, k):
    """Give every token the experts that the next token of its row likes best."""
    rows = scores.unflatten(0, context.batch_shape)
    following = torch.cat([rows[:, 1:], rows[:, :1]], dim=1).flatten(0, 1)
    return top_k(following, context, k=k)


def peeking():
    return Router(Gate(D, E), lambda scores, context: looking_ahead(scores, context, k=2), num_experts=E)


@pytest.mark.parametrize(
    "make",
    [
        model,
        lambda: model(hi_moe(tau=0.5)),
        lambda: model(lambda: presets.loss_free(D, E, 2)),
        lambda: model(dispatcher=lambda: Capacity(0.6)),
        lambda: model(first_dense=True),
    ],
    ids=["switch", "hi_moe", "loss_free", "capacity", "some layers"],
)
def test_what_is_causal_passes_in_both_modes(make):
    test = suffix_test(make(), texts(3))
    assert test.causal and not test.labelled and test.leaks == []
    assert [(suffix.mode, suffix.cut) for suffix in test.suffixes] == [
        (mode, cut) for mode in ("training", "eval") for cut in (1, 2, 5, 7, 9)
    ]
    assert all(suffix.change <= test.tolerance < suffix.after for suffix in test.suffixes)
    assert (test.rows, test.length) == (3, 10)
    check_causality(make(), texts())


def test_the_mean_of_the_same_batch_leaks_in_training_alone():
    test = suffix_test(model(hi_moe(tau=0.5, correction="same_batch")), texts())
    assert {suffix.mode for suffix in test.leaks} == {"training"}
    assert all(suffix.position == 0 and suffix.layer == "blocks.0.feed_forward" for suffix in test.leaks)
    assert list(test.labelled) == ["LogitCorrection"] and "mean_from" in test.labelled["LogitCorrection"]
    with pytest.raises(AssertionError, match=r"^DecoderLM: in training mode, exchanging the tokens from place 1 on ch"):
        check_causality(model(hi_moe(tau=0.5, correction="same_batch")), texts())


def test_a_change_too_small_for_another_expert_is_still_seen_in_the_weights():
    (leak, *_) = suffix_test(model(hi_moe(tau=1e-6, correction="same_batch")), texts(), cuts=[5]).leaks
    assert leak.what == "weights" and 1e-9 < leak.change < 1e-5


def test_places_given_out_by_column_leak_what_is_kept():
    crowded = model(dispatcher=lambda: Capacity(0.5, order="column_major"))
    test = suffix_test(crowded, texts(1, 40), modes=["training"], cuts=range(1, 40))
    assert not test.causal and list(test.labelled) == ["Capacity"]
    assert {leak.what for leak in test.leaks} == {"kept pairs"}
    assert suffix_test(crowded, texts(1, 40), modes=["eval"]).causal  # nothing is dropped


def test_a_selector_that_looks_ahead_leaks_by_one_place_and_says_nothing():
    test = suffix_test(model(peeking), texts(2, 12), cuts=[4, 11])
    assert not test.causal and not test.labelled
    assert [(leak.mode, leak.cut) for leak in test.leaks] == [
        ("training", 4),
        ("training", 11),
        ("eval", 4),
        ("eval", 11),
    ]
    assert all(leak.cut - 2 <= leak.position < leak.cut for leak in test.leaks)  # one place a layer
    assert all(leak.layer == "blocks.0.feed_forward" and leak.what == "experts" for leak in test.leaks)


def test_the_first_layer_that_decides_otherwise_is_named_where_the_first_layer_is_sound():
    leaky = model(peeking, first_dense=True)
    assert {leak.layer for leak in suffix_test(leaky, texts()).leaks} == {"blocks.1.feed_forward"}


class Reversed(nn.Module):
    """No router at all: every place sees the sum of all, of which the answer is made."""

    def __init__(self, answer=lambda logits: logits):
        super().__init__()
        self.embedding, self.answer = nn.Embedding(V, V), answer

    def forward(self, token_ids):
        x = self.embedding(token_ids)
        return self.answer(x + x.sum(1, keepdim=True))


class Causal(Reversed):
    def forward(self, token_ids):
        return self.answer(self.embedding(token_ids).cumsum(1))


@pytest.mark.parametrize(
    "answer",
    [lambda logits: logits, lambda logits: (logits, None), lambda logits: SimpleNamespace(logits=logits)],
    ids=["tensor", "tuple", "named"],
)
def test_anybodys_model_and_a_leak_that_is_no_routers(answer):
    check_causality(Causal(answer), texts())
    with pytest.raises(AssertionError, match=r"Reversed: in training mode, .* place 0, .*no router decided otherwise$"):
        check_causality(Reversed(answer), texts())


def test_the_layer_in_somebody_elses_block_is_found():
    adapted = MoEAdapter(MoE(peeking(), SwiGLUExperts(E, D, 6)))
    theirs = nn.Sequential(nn.Embedding(V, D), adapted, nn.Linear(D, V))
    (leak, *_) = suffix_test(theirs, texts()).leaks
    assert leak.layer == "1.moe" and leak.what == "experts"


class Noisy(Causal):
    def __init__(self, generator=None):
        super().__init__()
        self.dropout, self.generator = nn.Dropout(0.5), generator

    def forward(self, token_ids):
        logits = self.dropout(super().forward(token_ids))
        return logits if self.generator is None else logits + torch.rand((), generator=self.generator)


def test_noise_of_the_global_generator_stays_and_no_generator_moves():
    built, ids = Noisy(), texts()
    before = torch.get_rng_state()
    check_causality(built, ids)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_model_stays_as_it_is():
    built = model(hi_moe()).eval()
    before = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    check_causality(built, texts())
    assert not built.training and all(torch.equal(tensor, before[name]) for name, tensor in built.state_dict().items())
    assert {tensor.dtype for tensor in built.parameters()} == {torch.float32}
    assert not any(module._forward_hooks for module in built.modules())


class Deaf(Causal):
    def forward(self, token_ids):
        return super().forward(torch.zeros_like(token_ids))


class Broken(Causal):
    def forward(self, token_ids):
        return super().forward(token_ids) * torch.nan


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (lambda: Noisy(torch.Generator()), {}, "differ by .* reads the same text twice in training mode: its forward"),
        (Deaf, {}, "exchanging tokens changed no logit at all"),
        (Broken, {}, "logits are not all finite numbers"),
        (Causal, {"cuts": [0]}, r"cuts = \[0\] must each be between 1 and 9"),
        (Causal, {"cuts": [10]}, r"cuts = \[10\] must each be between 1 and 9"),
        (Causal, {"cuts": []}, r"cuts = \[\] must each be"),
        (Causal, {"modes": ["train"]}, r"modes = \['train'\] must be some of training, eval"),
        (Causal, {"token_ids": torch.zeros(2, 5, dtype=torch.int64)}, "hold at least two ids"),
        (Causal, {"token_ids": texts(2, 1)}, r"token_ids \(2, 1\) must be \(B, S\) with S ≥ 2"),
        (Causal, {"token_ids": texts(2, 5)[0]}, r"token_ids \(5,\) must be"),
    ],
)
def test_what_nothing_can_be_told_of_is_refused(make, options, text):
    with pytest.raises(ConfigError, match=text):
        check_causality(make(), **{"token_ids": texts(), **options})


def test_every_row_is_tried_and_every_exchanged_token_is_another():
    seen = []

    class Watching(Causal):
        def forward(self, token_ids):
            seen.append(token_ids.clone())
            return super().forward(token_ids)

    ids = texts(3, 6)
    suffix_test(Watching(), ids, cuts=[4], modes=["eval"])
    first, again, *tried = seen
    assert torch.equal(first, ids) and torch.equal(again, ids) and len(tried) == 3
    for row, changed in enumerate(tried):
        expected = torch.zeros(3, 6, dtype=torch.bool)
        expected[row, 4:] = True
        assert torch.equal(changed != ids, expected)
        assert set(changed.flatten().tolist()) <= set(ids.flatten().tolist())


def test_progress_ends_at_one_and_short_texts_have_fewer_cuts():
    done = []
    suffix_test(Causal(), texts(1, 2), progress=done.append)
    assert done == [0.5, 1.0]
    assert default_cuts(2) == [1] and default_cuts(5) == [1, 2, 3, 4]


def leaks(function):
    function.causal = False
    return function


def test_parts_that_say_they_are_not_causal_are_found_wherever_they_stand():
    @leaks
    def sorted_out(scores, context, *, k):
        return top_k(scores, context, k=k)

    @leaks
    def rank(logits):
        return logits.argsort(0).float()

    rank.causal_reason = "ranks over all tokens"
    router = Router(Gate(D, E), partial(sorted_out, k=2), num_experts=E, score=rank)
    layer = MoE(router, SwiGLUExperts(E, D, 6))
    assert non_causal_parts(layer) == {"sorted_out": "", "rank": "ranks over all tokens"}
    layer.experts.causal = False
    assert set(non_causal_parts(nn.Sequential(layer))) == {"sorted_out", "rank", "SwiGLUExperts"}
    assert non_causal_parts(model()) == {}
