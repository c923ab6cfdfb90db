"""The global-batch loss over two ranks (gloo): their mean is one process with the whole batch, losses and gradients."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from two_processes import RANKS, run_on_two_ranks

import himoe
from himoe import GlobalBatch, Groups, MoE, PerGroup, Schedule, SwiGLUExperts, Switch, ZLoss, presets
from himoe.balance import Chain

E, D, K = 8, 6, 2
GROUPS = Groups(((7, 0, 3, 5, 2), (4, 1, 6)))


def make_model(seed: int = 0) -> nn.ModuleList:
    """Four layers: the balancer alone, one without, one among others, one for each group."""
    balancers = [
        GlobalBatch(weight=0.3),
        Switch(weight=0.0),
        Schedule(Chain(ZLoss(weight=0.01), GlobalBatch(weight=0.2)), "off_after", steps=9),
        PerGroup(GROUPS, [GlobalBatch(weight=0.1), Chain(GlobalBatch(weight=0.4))]),
    ]
    layers = []
    torch.manual_seed(seed)
    for balancer in balancers:
        router = presets.switch(D, E, K)
        router.balancer = balancer
        layers.append(MoE(router, SwiGLUExperts(E, D, 4)))
        with torch.no_grad():
            router.gate.weight.mul_(3)
    return nn.ModuleList(layers).double()


def tokens(step: int, micro: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    return torch.randn(7, D, dtype=torch.float64, generator=generator) + 0.5 * rank


def forward(model: nn.ModuleList, x: Tensor) -> list:
    routings = []
    for layer in model:
        y, routing = layer(x)
        x = x + y
        routings.append(routing)
    return routings


def steps(ranks: list[int], micro_batches: int) -> list[dict]:
    """Two optimizer steps with the tokens of these ranks; the loss of every micro-batch, and the step's gradients."""
    model, found = make_model(), []
    for step in range(2):
        losses = []
        for micro in range(micro_batches):
            routings = forward(model, torch.cat([tokens(step, micro, rank) for rank in ranks]))
            loss = sum(himoe.aux_losses(model, routings).values())
            loss.backward()
            himoe.observe(model, routings)
            losses.append(loss.item())
        himoe.step(model)
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        found.append({"losses": losses, "grads": grads})
    return found


def reductions(rank: int) -> dict[str, int]:
    """How many all-reduces each call needs; ranks that do unequal work must not wait for one another."""
    model, without = make_model(), nn.ModuleList([make_model()[1]])
    counted = {}
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce:

        def count(name: str, call) -> None:
            before = reduce.call_count
            call()
            counted[name] = reduce.call_count - before

        routings = forward(model, tokens(0, 0, rank))
        count("every layer", lambda: himoe.aux_losses(model, routings))
        count("observe", lambda: himoe.observe(model, routings))
        if rank == 0:
            count("some layers", lambda: himoe.aux_losses(model, [None, routings[1], None, routings[3]]))
            model.eval()
            count("evaluation", lambda: himoe.aux_losses(model, forward(model, tokens(0, 0, rank))))
            model.train()
        else:
            count("some layers", lambda: himoe.aux_losses(model, routings))
        count("nobody asks", lambda: himoe.aux_losses(without, forward(without, tokens(0, 0, rank))))
        count("step", lambda: himoe.step(model))
    return counted


def partly(rank: int) -> float:
    """The loss of the first layer where rank 1 ran it in the first micro-batch alone."""
    model = nn.ModuleList([make_model()[0]])
    routings = forward(model, tokens(0, 0, rank))
    himoe.observe(model, routings)
    routings = forward(model, tokens(0, 1, rank)) if rank == 0 else [None]
    return float(sum(himoe.aux_losses(model, routings).values()))


def work(rank: int) -> dict:
    found = {count: steps([rank], count) for count in (1, 2, 4)}
    return {"steps": found, "reductions": reductions(rank), "partly": partly(rank)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return run_on_two_ranks(work, tmp_path_factory.mktemp("global_batch"))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_mean_over_ranks_is_one_process_with_the_whole_batch(ranks, count):
    for step, whole in enumerate(steps([0, 1], count)):
        parts = [rank["steps"][count][step] for rank in ranks]
        means = [sum(values) / RANKS for values in zip(*(part["losses"] for part in parts), strict=True)]
        assert means == pytest.approx(whole["losses"], rel=1e-12)
        assert whole["grads"].keys() == parts[0]["grads"].keys() == parts[1]["grads"].keys()
        for name, expected in whole["grads"].items():
            mean = sum(part["grads"][name] for part in parts) / RANKS
            assert torch.allclose(mean, expected, rtol=1e-9, atol=1e-14), name
        for layer in (0, 2, 3):
            assert whole["grads"][f"{layer}.router.gate.weight"].abs().max() > 1e-4


def test_each_rank_by_itself_would_find_another_loss(ranks):
    alone = [steps([rank], 1)[0]["losses"][0] for rank in range(RANKS)]
    together = [rank["steps"][1][0]["losses"][0] for rank in ranks]
    assert all(abs(one - other) > 1e-4 for one, other in zip(alone, together, strict=True))


def test_one_reduction_for_all_layers_and_none_where_nobody_asks(ranks):
    once = {"every layer": 1, "observe": 0, "some layers": 1, "nobody asks": 0, "step": 1}
    assert ranks[0]["reductions"] == once | {"evaluation": 0}
    assert ranks[1]["reductions"] == once


def test_a_rank_where_a_layer_did_not_run_brings_what_it_has_counted(ranks):
    layer = make_model()[0]
    counts = torch.zeros(E)
    for micro, rank in ((0, 0), (0, 1), (1, 0)):
        last = tokens(micro=micro, step=0, rank=rank)
        counts += torch.bincount(layer(last)[1].expert_ids.flatten(), minlength=E)
    p = layer.router(tokens(0, 1, 0)).logits.softmax(-1).mean(0)
    assert ranks[0]["partly"] == pytest.approx((0.3 * E * (counts / counts.sum() * p).sum()).item(), rel=1e-6)
    assert ranks[1]["partly"] == 0
