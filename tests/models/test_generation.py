"""Generation: cached and batched as if uncached and alone; temperature, top k, top p, stopping, seeds, bad input."""

import itertools

import numpy as np
import pytest
import torch
from small_models import V, make_lm, make_moe
from torch import nn

from himoe import Capacity
from himoe.errors import ConfigError, HimoeError, HimoeWarning
from himoe.models import generate

pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")

END = V - 1
PROMPTS = [[END, 3, 1, 4], [END], [END, 9, 2, 6, 5, 3, 5], [END, 3, 1, 4]]


def lively(feed_forward=lambda _: make_moe("hi_moe"), **options):
    """A small model with large untied weights, so that what it says depends on everything before."""
    model = make_lm(feed_forward, tie_embeddings=False, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


def texts(*arguments, **options):
    """One list of new tokens per prompt."""
    steps = list(generate(*arguments, **{"max_new_tokens": 12, **options}))
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


@torch.no_grad()
def greedy_without_cache(model, prompt, length):
    text = list(prompt)
    for _ in range(length):
        text.append(model(torch.tensor([text]))[0][0, -1].argmax().item())
    return text[len(prompt) :]


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("hi_moe", {}),
        ("loss_free", {}),
        ("deepseek_v3", {"num_groups": 4}),
        ("moge", {}),
        ("switch", {"top_k": 1}),
        ("switch", {"top_k": 2, "dispatcher": Capacity(0.5)}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_greedy_text_is_that_of_the_model_without_a_cache(preset, options, dtype):
    model = lively(lambda _: make_moe(preset, **options), num_heads=4, num_kv_heads=2).to(dtype)
    together = texts(model, PROMPTS, temperature=0)
    assert together == [greedy_without_cache(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(text) for text in together}) == 3 and len(set(together[0])) > 2  # it does say different things


def test_a_prompt_says_the_same_whatever_stands_beside_it():
    model = lively()
    together = texts(model, PROMPTS, seed=5)
    assert texts(model, [PROMPTS[2]], seed=5) == [together[2]]
    assert texts(model, PROMPTS[::-1], seed=5)[1:3] == [together[2], together[1]]
    assert together[0] != together[3]  # the same prompt twice: two samples
    assert texts(model, [PROMPTS[0]] * 2, seed=5) == [together[0], together[3]]


def test_a_seed_fixes_the_text_and_the_global_random_numbers_do_not_matter():
    model = lively()
    first = texts(model, PROMPTS, seed=1)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert texts(model, PROMPTS, seed=1) == first != texts(model, PROMPTS, seed=2)
    assert torch.equal(torch.get_rng_state(), before)


class Says(nn.Module):
    """In place of the head: always the same logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float64), requires_grad=False)

    def forward(self, x):
        return self.logits.expand(*x.shape[:-1], -1)


def shares(probabilities, **options):
    """How often each of four tokens is drawn by a model that gives them these probabilities."""
    model = make_lm(vocab_size=4).double().eval()
    model.head = Says([p if p > 0 else 1e-30 for p in probabilities])
    model.head.logits.log_()
    drawn = list(itertools.chain(*texts(model, [[0]] * 40, max_new_tokens=50, **options)))
    return [drawn.count(token) / len(drawn) for token in range(4)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [0.01 / 0.30, 0.16 / 0.30, 0.04 / 0.30, 0.09 / 0.30]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 99}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.3}, [0, 1, 0, 0]),
        ({"top_p": 0.69}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.71}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),  # 4/7 of what top_k left
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 1e-300}, [0, 1, 0, 0]),
    ],
)
def test_tokens_are_drawn_in_the_stated_shares(options, expected):
    found = shares([0.1, 0.4, 0.2, 0.3], **options)
    assert found == pytest.approx(expected, abs=0.04)
    assert [share == 0 for share in found] == [share == 0 for share in expected]


def test_prompts_may_be_arrays_and_tensors():
    model, prompts = lively(), [[END, 3, 1], [END, 3, 1]]
    assert texts(model, torch.tensor(prompts)) == texts(model, list(map(np.array, prompts))) == texts(model, prompts)


def test_it_streams_and_a_stop_token_ends_its_row_alone():
    model = lively()
    free = texts(model, PROMPTS, temperature=0)
    stop = free[0][2]
    steps = list(generate(model, PROMPTS, max_new_tokens=12, temperature=0, stop={stop}))
    for row, text in enumerate(free):
        end = text.index(stop) + 1 if stop in text else 12
        padded = text[:end] + [None] * (12 - end)
        assert [step[row] for step in steps] == padded[: len(steps)] and set(padded[len(steps) :]) <= {None}
    assert next(generate(model, PROMPTS, max_new_tokens=10**9)) is not None  # nothing is done before it is asked for


def test_it_ends_when_all_rows_have():
    model = lively()
    assert len(list(generate(model, PROMPTS, max_new_tokens=9, stop=range(V)))) == 1


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there is no prompt"),
        ([[1], []], {}, "prompt 1 has no token"),
        ([[1, V]], {}, f"prompt 0 holds token {V}; the model knows 0 … {V - 1}"),
        ([[-1]], {}, "holds token -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens = 0 must be ≥ 1"),
        ([[1]], {"temperature": -0.1}, "temperature = -0.1 must be ≥ 0"),
        ([[1]], {"temperature": float("nan")}, "temperature = nan must be ≥ 0"),
        ([[1]], {"top_k": 0}, "top_k = 0 must be ≥ 1"),
        ([[1]], {"top_p": 0.0, "seed": -1}, "top_p = 0.0 must be above 0 and at most 1; seed = -1 must be ≥ 0"),
    ],
)
def test_what_cannot_work_is_named_at_the_call(prompts, options, message):
    with pytest.raises(ConfigError, match=message):
        generate(make_lm().eval(), prompts, **{"max_new_tokens": 3, **options})


def test_a_capacity_that_drops_in_eval_is_warned_of():
    model = make_lm(lambda _: make_moe("switch", top_k=2, dispatcher=Capacity(0.5, drop_in_eval=True))).eval()
    with pytest.warns(HimoeWarning, match="set drop_in_eval = False"):
        generate(model, [[1]], max_new_tokens=3)


def test_training_mode_and_broken_weights_are_named():
    model = make_lm()
    with pytest.raises(ConfigError, match=r"call model.eval\(\) first"):
        generate(model, [[1]], max_new_tokens=3)
    nn.init.constant_(model.norm.weight, float("nan"))
    with pytest.raises(HimoeError, match="not finite: its weights have diverged"):
        next(generate(model.eval(), [[1]], max_new_tokens=3))
