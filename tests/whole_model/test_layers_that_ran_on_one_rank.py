"""A layer may run on one rank and not on another, or on none: every rank still reduces equally many sums."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from router_zoo import E, G, everything, same, state_of
from torch import nn

import himoe
from himoe import MoE, SwiGLUExperts, presets

RANKS = 2
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


def worker(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    try:
        torch.save(steps_of([rank]), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks_are_one_process_whichever_layers_run_where(tmp_path):
    mp.spawn(worker, args=(str(tmp_path),), nprocs=RANKS)
    expected = steps_of([0, 1])
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert all(same(one, other, 1e-7) for one, other in zip(found, expected, strict=True))
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
