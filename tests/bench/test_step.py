"""The clock with one hand: it sees every part, adds up to the step, and changes nothing."""

import time
from unittest.mock import patch

import pytest
import torch

from himoe.bench.laps import REST, Laps, following
from himoe.bench.model import RandomRows, WrongPeerError, _trainer, measure_model, model_config
from himoe.bench.step import Clocked, clocked_step, measure_step, record, trainer_of
from himoe.build import build_model
from himoe.config import load_config
from himoe.errors import ConfigError

SMALL = {"layers": 2, "dim": 32, "experts": 8, "top_k": 4, "hidden_dim": 16, "tokens": 32}
VOCAB = 4096


class Time:
    """A clock that tests move."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    """Put a clock that tests move in the place of the real one."""
    mine = Time()
    with patch.object(time, "perf_counter", mine):
        yield mine


def trainer(*sets):
    torch.manual_seed(0)
    config = model_config(**SMALL)
    if sets:
        config = load_config("lm_small", sets=[*(f"{k}={v}" for k, v in sizes().items()), *sets])
    return _trainer(config, build_model(config, VOCAB))


def sizes():
    return {
        "model.num_layers": 2, "model.dim": 32, "model.num_heads": 1, "model.num_kv_heads": 1, "model.ffn_dim": 32,
        "moe.num_experts": 8, "moe.top_k": 4, "moe.expert_dim": 16, "train.batch_size": 2, "train.seq_len": 16,
    }  # fmt: skip


def test_the_hand_counts_for_one_part_at_a_time(clock):
    laps = Laps()
    laps.start()
    clock.now += 1
    assert laps.switch("router") == REST
    clock.now += 2
    inner = laps.around("experts", lambda: setattr(clock, "now", clock.now + 4))
    inner()
    clock.now += 8
    laps.switch(REST)
    found = {part: seconds for part, seconds in laps.seconds.items() if seconds}
    assert found == {REST: 1.0, "router": 10.0, "experts": 4.0}


def test_backward_counts_for_the_module_it_is_in(clock):
    """Each module's forward takes one second, its backward ten; what stands between them none."""

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, clock):
            ctx.clock = clock
            clock.now += 1
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            ctx.clock.now += 10
            return grad, None

    subject, laps = trainer(), Laps()
    layers = subject.model.blocks
    slow = lambda module, args, output: Slow.apply(output, clock)  # noqa: E731
    for block in layers:
        block.attention.register_forward_hook(slow)
    layers[1].feed_forward.experts.register_forward_hook(slow)
    with following(subject, laps):
        subject.step()
    found = {part: round(seconds) for part, seconds in laps.seconds.items() if seconds >= 0.5}
    assert found == {"attention": 22, "experts": 11}


@pytest.mark.parametrize("sets", [(), ("moe.capacity_factor=1.0", "moe.shared_dim=16", "moe.every=2")])
def test_every_part_is_seen_and_they_add_up(sets):
    subject = trainer(*sets)
    subject.step()
    found = record([clocked_step(subject)], [1.0], subject)
    wanted = {
        "attention",
        "router",
        "dispatch",
        "experts",
        "loss",
        "optimizer",
        "balancers",
        "statistics",
        "data",
    }
    wanted |= {REST, "dense layers"} if sets else {REST}
    assert set(found["parts"]) == wanted
    assert sum(one["share"] for one in found["parts"].values()) == pytest.approx(1.0)
    assert sum(one["ms"] for one in found["parts"].values()) == pytest.approx(found["parts_ms"])
    # The hand starts before the step and stops after it, so it cannot have less; a busy machine may give it more.
    assert found["parts_ms"] >= found["step_ms"]["with_clock"]["minimum"]


def test_the_fastest_step_gives_the_parts():
    subject = trainer()
    slow, fast = Laps(), Laps()
    slow.seconds |= {"attention": 3.0, "router": 1.0}
    fast.seconds |= {"attention": 1.0, "router": 1.0}
    found = record([Clocked(4.0, slow), Clocked(2.0, fast)], [3.0, 1.0, 2.0], _stepped(subject))
    assert found["parts"] == {"attention": {"ms": 1000.0, "share": 0.5}, "router": {"ms": 1000.0, "share": 0.5}}
    assert found["step_ms"]["without_clock"] == {"minimum": 1000.0, "median": 2000.0}
    assert found["tokens_per_second"] == 32


def _stepped(subject):
    subject.steps_done, subject.tokens_done = 1, 32
    return subject


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_training_under_the_clock_is_the_same_to_the_bit_and_leaves_nothing_behind(recompute):
    plain, clocked = trainer(), trainer()
    plain.model.recompute = clocked.model.recompute = recompute
    for number in range(3):
        plain.step()
        if number == 1:
            clocked_step(clocked)
        else:
            clocked.step()
    for (name, left), right in zip(plain.model.named_parameters(), clocked.model.parameters(), strict=True):
        assert torch.equal(left, right), name
    hooks = [module._forward_hooks or module._forward_pre_hooks for module in clocked.model.modules()]
    assert not any(hooks)
    assert "step" not in vars(clocked.optimizer) or clocked.optimizer.step.__name__ != "timed"


def test_recomputed_layers_count_for_their_modules():
    none, full = trainer(), trainer()
    full.model.recompute = "full"
    for subject in (none, full):
        subject.step()
    calls = {}
    for name, subject in (("none", none), ("full", full)):
        seen = []
        with patch.object(Laps, "switch", lambda laps, part, seen=seen: seen.append(part) or REST):
            clocked_step(subject)
        calls[name] = seen.count("attention")
    assert calls["full"] > calls["none"]


def test_a_recipes_step_is_measured_in_turns():
    subject = trainer()
    found = measure_step(subject, steps=2)
    assert found["steps"] == 2 and subject.steps_done == 2 + 2 * 2


def test_compiled_layers_are_refused():
    config = load_config("lm_tiny", sets=["train.compile=true"])
    with pytest.raises(ConfigError, match=r"train\.compile"):
        trainer_of(config, None)


def test_two_models_are_compared_with_amdahls_bound():
    said = []
    found = measure_model(model_config(**SMALL), steps=2, say=said.append)
    steps = found["steps"]
    assert set(steps) == {"ours", "hf_grouped"} and found["peer"] == "hf_grouped"
    own, peer = (steps[name]["step_ms"]["without_clock"]["minimum"] for name in ("ours", "hf_grouped"))
    assert found["ratio"] == pytest.approx(peer / own)
    own, peer = (steps[name]["step_ms"]["without_clock"]["median"] for name in ("ours", "hf_grouped"))
    assert found["ratio_median"] == pytest.approx(peer / own) and 0 < found["ratio_cpu"] < 1e3
    share, speedup = found["experts_share"], found["experts_ratio"]
    assert found["amdahl_bound"] == pytest.approx(1 / (1 - share + share / speedup))
    assert 0 < share < 1 and found["model"]["tokens"] == 32


def test_models_that_differ_are_not_timed():
    class Wrong(torch.nn.Module):
        def __init__(self, ours, _implementation):
            super().__init__()
            self.ours = ours

        def forward(self, *args):
            return self.ours(*args) * 1.01

    with patch("himoe.bench.model._Swapped", Wrong), pytest.raises(WrongPeerError, match=r"gradient of .* differs"):
        measure_model(model_config(**SMALL), steps=1)


def test_random_rows_are_a_function_of_the_step():
    rows = RandomRows(2, 5)
    first, again, other = (rows.micro_batch(step, 0).tokens for step in (3, 3, 4))
    assert first.shape == (2, 6) and (first == again).all() and (first != other).any()
