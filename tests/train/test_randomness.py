"""Noise is a function of (seed, step, micro-batch, rank): resumed, repeated and recomputed passes draw it again."""

import shutil
from functools import partial

import pytest
import torch
from run_case import SHORT, config, lines, timeless, train
from run_case import weights as file_of_weights
from tiny_training import DIM, TinyLM, equal, make_trainer, weights

from himoe import DecoderLM, MoE, Router, SwiGLUExperts, Switch
from himoe.errors import HimoeError
from himoe.functional.selection import top_k
from himoe.nn import NoisyGate
from himoe.train import randomness
from himoe.train.randomness import seed_noise
from himoe.train.snapshot import restore, save

CONFIG = {"seed": 0, "train": {"steps": 20}}


def noisy_router(dim=DIM):
    return Router(NoisyGate(dim, 8), partial(top_k, k=2), num_experts=8, balancer=Switch(weight=0.01))


class Spy(TinyLM):
    """Remembers the noise of every forward pass in training."""

    def __init__(self):
        super().__init__(noisy_router())
        self.seen = []

    def forward(self, *arguments, **options):
        answer, routings = super().forward(*arguments, **options)
        self.seen += [routing.context.noise.detach() for routing in routings if self.training]
        return answer, routings


def trainer_of(**options):
    """The same weights every time."""
    torch.manual_seed(0)
    return make_trainer(model=Spy(), **options)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_with_a_noisy_gate_equals_the_whole_one_bit_for_bit(tmp_path, accumulate):
    whole, first = (trainer_of(accumulate=accumulate) for _ in range(2))
    for _ in range(6):
        whole.step()
        torch.rand(5)  # as if an evaluation had drawn something
    for _ in range(3):
        first.step()
    path = save(first, tmp_path, seconds=1.0, config=CONFIG, data_hash="abc")
    second = trainer_of(accumulate=accumulate)
    restore(second, path, CONFIG, "abc")
    for _ in range(3):
        second.step()
    assert equal(weights(whole), weights(second))
    assert whole.means.read() == second.means.read() and whole.statistics.read() == second.statistics.read()
    assert all(torch.equal(*pair) for pair in zip(whole.model.seen[-3 * accumulate :], second.model.seen, strict=True))


def test_no_two_micro_batches_steps_seeds_or_ranks_draw_the_same(monkeypatch):
    drawn = []
    for seed, rank in ((0, 0), (1, 0), (0, 1)):
        monkeypatch.setattr("himoe.train.loop.rank", lambda rank=rank: rank)
        trainer = trainer_of(accumulate=2)
        trainer.seed = seed
        with torch.no_grad():  # the same standard deviation everywhere, so that equal draws would be equal noise
            trainer.model.moe.router.gate.noise_weight.zero_()
            trainer.model.moe.router.gate.noise_weight.requires_grad_(False)
        trainer.step()
        trainer.step()
        drawn += trainer.model.seen
    assert len(drawn) == 12
    assert not any(torch.equal(one, other) for i, one in enumerate(drawn) for other in drawn[:i])


def test_the_search_for_what_is_not_finite_repeats_the_noise_of_the_step():
    trainer = trainer_of(accumulate=2)
    trainer.step()
    with torch.no_grad():
        trainer.model.moe.experts.down_proj[3].fill_(float("nan"))
    with pytest.raises(HimoeError, match="diverged at step 2"):
        trainer.step()
    assert len(trainer.model.seen) == 4  # a weight is found first: nothing is repeated
    trainer = trainer_of(accumulate=2)
    trainer.step()
    trainer.model.head.register_forward_hook(lambda module, inputs, output: output * float("inf"))
    with pytest.raises(HimoeError, match="the output of head"):
        trainer.step()
    assert len(trainer.model.seen) == 6
    assert all(torch.equal(*pair) for pair in zip(trainer.model.seen[2:4], trainer.model.seen[4:], strict=True))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_layers_draw_the_same_noise(recompute):
    def layer(index):
        return MoE(noisy_router(16), SwiGLUExperts(8, 16, 12))

    def gradients(mode):
        torch.manual_seed(0)
        model = DecoderLM(vocab_size=20, dim=16, num_layers=2, num_heads=2, feed_forward=layer)
        model.recompute = mode
        seed_noise(3, step=1, micro_batch=0, rank=0)
        ids = torch.arange(24).view(2, 12) % 20
        logits, routings = model(ids)
        loss = logits.square().mean() + sum(routing.weights.square().sum() for routing in routings)
        loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    kept, again = gradients("none"), gradients(recompute)
    assert kept.keys() == again.keys()
    for name, grad in kept.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-5, atol=1e-7, msg=name)
    assert any(grad.abs().sum() > 0 for name, grad in kept.items() if name.endswith("noise_weight"))


NOISY = ["moe.selector=top_k", "moe.gate=noisy", 'moe.balancers=[{name="switch"}]', "train.accumulate=2"]


def test_a_run_with_a_noisy_gate_resumes_bit_for_bit(text, tmp_path):
    train(config(text, *NOISY), tmp_path / "whole")
    train(config(text, *NOISY), tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoints/step-00000008")
    train(config(text, *NOISY), tmp_path / "parts", resume=True)
    assert file_of_weights(tmp_path / "parts") == file_of_weights(tmp_path / "whole")
    assert timeless(lines(tmp_path / "parts/load.jsonl")) == timeless(lines(tmp_path / "whole/load.jsonl"))


def test_the_trainer_of_a_configuration_has_its_seed(text, monkeypatch, tmp_path):
    seeds = []
    monkeypatch.setattr("himoe.train.loop.seed_noise", lambda *where: seeds.append(where))
    train(config(text, *SHORT, "seed=7", "train.accumulate=2"), tmp_path)
    assert seeds == [(7, 0, 0, 0), (7, 0, 1, 0)]


def test_a_process_that_is_alone_has_rank_0():
    assert randomness.rank() == 0
