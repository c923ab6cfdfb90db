"""A layer may run on one rank and not on another, or on none: every rank still reduces equally many sums."""

import pytest
import torch
from router_zoo import E, G, everything, same, state_of
from torch import nn
from two_processes import RANKS, run_on_two_ranks

import himoe
import himoe.functional.stats
from himoe import GlobalBatch, MoE, SwiGLUExperts, presets

RUNS = [  # for each optimizer step and rank, which of the two layers run
    ((True, True), (True, False)),
    ((False, True), (True, False)),
    ((False, False), (True, True)),
    ((False, False), (False, False)),
    ((True, False), (True, False)),
]


def make_layers() -> nn.ModuleList:
    torch.manual_seed(0)
    layers = nn.ModuleList()
    for _ in range(2):
        router = presets.hi_moe(6, E, G, num_groups=G)
        router.balancer = everything()
        layers.append(MoE(router, SwiGLUExperts(E, 6, 4)).double())
    return layers


def steps_of(ranks: list[int]) -> list[dict[str, torch.Tensor]]:
    """The state after every step, of one process that sees the micro-batches of these ranks."""
    layers, states = make_layers(), []
    for step, runs in enumerate(RUNS):
        for rank in ranks:
            generator = torch.Generator().manual_seed(10 * step + rank)
            x = torch.randn(11 + rank, 6, dtype=torch.float64, generator=generator)
            routings = [layer(x)[1] if ran else None for layer, ran in zip(layers, runs[rank], strict=True)]
            himoe.observe(layers, routings)
        himoe.step(layers)
        states.append(state_of(layers))
    return states


def losses_where_a_layer_evaluates(ranks: list[int]) -> float:
    """The loss over the global batch of the second layer, the first being in eval mode: one term, of all ranks."""
    layers, found = make_layers(), []
    for layer in layers:
        layer.router.balancer = GlobalBatch()
    layers[0].eval()
    x = [torch.randn(11 + r, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(r)) for r in range(RANKS)]
    for rank in ranks:
        routings = [layer(x[rank])[1] for layer in layers]
        if len(ranks) > 1:  # what the ranks would have added up
            counts = sum(himoe.functional.stats.selected_load(layers[1](each)[1]) for each in x)
            found.append(layers[1].router.balancer.losses(routings[1].replace(step_counts=counts))["global_balance"])
        else:
            evaluated = layers[0].router.balancer.losses(routings[0])["global_balance"]
            found.append(himoe.aux_losses(layers, routings)["global_balance"] - evaluated)
    return (sum(found) / len(found)).item()


def work(rank: int) -> dict:
    return {"steps": steps_of([rank]), "losses": losses_where_a_layer_evaluates([rank])}


def test_two_ranks_are_one_process_whichever_layers_run_where(tmp_path):
    ranks, expected = run_on_two_ranks(work, tmp_path), steps_of([0, 1])
    for rank in ranks:
        assert all(same(one, other, 1e-7) for one, other in zip(rank["steps"], expected, strict=True))
    assert sum(rank["losses"] for rank in ranks) / RANKS == pytest.approx(losses_where_a_layer_evaluates([0, 1]))
    assert not same(expected[0], steps_of([0])[0], 1e-4)  # the other rank's tokens do matter


def test_a_layer_that_did_not_run_moves_nothing():
    layers = make_layers()
    x = torch.randn(11, 6, dtype=torch.float64)
    himoe.observe(layers, [layers[0](x)[1], None])
    before = state_of(layers)
    himoe.step(layers)
    moved = {name for name, value in state_of(layers).items() if not torch.equal(value, before[name])}
    steps = {name for name in before if name.endswith("num_steps")}  # of schedules, which count optimizer steps
    assert moved - steps and all(name.startswith("0.") for name in moved - steps)
