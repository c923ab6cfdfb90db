"""Two ranks with one micro-batch each are one process with both (gloo)."""

import pytest
import torch
from router_zoo import E, G, everything, same, state_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from two_processes import RANKS, run_on_two_ranks

import himoe
from himoe import Balancer, MoE, SwiGLUExperts, presets

# Tokens of each rank in each optimizer step; −n is n tokens of padding. No rank has nothing to say, none may hang.
STEPS = [(12, 12), (20, 3), (1, 1), (9, -4), (-2, -2)]


def make_layer() -> MoE:
    torch.manual_seed(0)
    router = presets.hi_moe(6, E, G, num_groups=G)
    router.balancer = everything()
    with torch.no_grad():
        router.gate.weight.mul_(3)
    return MoE(router, SwiGLUExperts(E, 6, 4)).double()


class Toy(nn.Module):
    """A layer that remembers its routing, so that the wrapped forward returns a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = make_layer()

    def forward(self, x, mask):
        y, self.routing = self.layer(x, mask)
        return y


def micro_batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    size = STEPS[step % len(STEPS)][rank]
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(abs(size), 6, dtype=torch.float64, generator=generator)
    return x, torch.full((abs(size),), size > 0)


def loss_of(model: nn.Module, toy: Toy, x, mask) -> torch.Tensor:
    y = model(x, mask)
    return y.square().mean() + sum(himoe.aux_losses(toy, [toy.routing]).values())


def sums_of(model: nn.Module) -> list[torch.Tensor]:
    return [value for m in model.modules() if isinstance(m, Balancer) for value in m.sums.values()]


def plain_steps(ranks: list[int]) -> list[dict[str, torch.Tensor]]:
    """The state after every step, seen with the micro-batches of these ranks."""
    toy, states = Toy(), []
    for step in range(len(STEPS)):
        for rank in ranks:
            toy(*micro_batch(step, rank))
            himoe.observe(toy, [toy.routing])
        himoe.step(toy)
        states.append(state_of(toy))
    return states


def wrapped_steps(rank: int) -> dict:
    """Two micro-batches a step under DDP, whose forward broadcasts rank 0's buffers."""
    toy = Toy()
    model = DistributedDataParallel(toy, broadcast_buffers=True)
    kept = []
    for micro in range(2):
        loss_of(model, toy, *micro_batch(micro, rank)).backward()
        himoe.observe(toy, [toy.routing])
        kept.append([value.clone() for value in sums_of(toy)])
    model(*micro_batch(0, rank))  # one more broadcast between observing and stepping
    untouched = all(torch.equal(a, b) for a, b in zip(kept[-1], sums_of(toy), strict=True))
    grads = {name: p.grad.clone() for name, p in toy.named_parameters()}
    himoe.step(model)
    return {"untouched": untouched, "sums": kept[-1], "grads": grads, "state": state_of(toy)}


def work(rank: int) -> dict:
    return {"steps": plain_steps([rank]), "wrapped": wrapped_steps(rank)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return run_on_two_ranks(work, tmp_path_factory.mktemp("two_processes"))


def test_two_ranks_are_one_process_with_both_micro_batches(ranks):
    expected = plain_steps([0, 1])
    for rank in ranks:
        assert len(rank["steps"]) == len(STEPS)
        assert all(same(found, want, 1e-7) for found, want in zip(rank["steps"], expected, strict=True))
    lonely = plain_steps([0])
    assert not same(expected[0], lonely[0], 1e-4)  # the other rank's tokens do matter
    for name in ("mean_logits", "multipliers", "bias", "momentum", "cutoff", "multiplier", "mean_probabilities"):
        found = [value for key, value in ranks[0]["steps"][-1].items() if key.endswith(name)]
        assert found and all(value.abs().max() > 1e-3 for value in found), name


def test_state_is_identical_on_all_ranks(ranks):
    for one, other in zip(ranks[0]["steps"], ranks[1]["steps"], strict=True):
        assert same(one, other)
    assert same(ranks[0]["wrapped"]["state"], ranks[1]["wrapped"]["state"])


def test_ddp_broadcasts_no_rank_local_sum(ranks):
    toy = Toy()
    for rank in range(RANKS):
        assert ranks[rank]["wrapped"]["untouched"]
        local = Toy()
        for micro in range(2):
            for model in (local, toy):
                model(*micro_batch(micro, rank))
                himoe.observe(model, [model.routing])
        pairs = zip(sums_of(local), ranks[rank]["wrapped"]["sums"], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    himoe.step(toy)
    assert same(state_of(toy), ranks[0]["wrapped"]["state"], 1e-7)


def test_data_parallel_averages_the_auxiliary_gradient(ranks):
    toy = Toy()
    for rank in range(RANKS):
        for micro in range(2):
            (loss_of(toy, toy, *micro_batch(micro, rank)) / RANKS).backward()
    expected = {name: p.grad for name, p in toy.named_parameters()}
    assert same(expected, ranks[0]["wrapped"]["grads"], 1e-10)
    assert expected["layer.router.gate.weight"].abs().max() > 1e-4
