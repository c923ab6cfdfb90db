"""The layer as one graph, forward and backward; the code generator behind the graph is torch's own business."""

import pytest
import torch
from small_layers import make_moe, tokens

from himoe import Capacity, Groups, aux_losses
from himoe.balance import Chain, GlobalBatch, Importance, LossFree, PerGroup, Phi, Similarity
from himoe.nn import SwiGLU


def with_many_balancers():
    moe, groups = make_moe("loss_free"), Groups(((5, 0, 3), (1, 2), (4, 6, 7)))
    per_group = PerGroup(groups, [Chain(LossFree(size), Phi(size), GlobalBatch()) for size in groups.sizes])
    moe.router.balancer = Chain(per_group, Importance(), Similarity(norm="l1"), GlobalBatch())
    return moe


LAYERS = {
    "balancers per group and over the global batch": with_many_balancers,
    "grouped selection, shared expert, grouped kernel": lambda: make_moe(
        "hi_moe", backend="grouped", shared=SwiGLU(16, 8)
    ),
    "unequal groups, capacity": lambda: make_moe("hi_moe explicit groups", dispatcher=Capacity(0.8)),
    "capacity by score": lambda: make_moe("switch", top_k=2, dispatcher=Capacity(0.6, order="score")),
    "capacity, batch prioritised": lambda: make_moe(
        "switch", top_k=2, dispatcher=Capacity(0.6, order="batch_prioritised")
    ),
    "capacity, column by column": lambda: make_moe("switch", top_k=2, dispatcher=Capacity(0.6, order="column_major")),
}


@pytest.mark.parametrize("name", LAYERS)
def test_one_graph_equals_eager(name):
    moe = LAYERS[name]()
    x, mask = tokens(3, 4).requires_grad_(), torch.arange(12).view(3, 4) % 5 != 0
    trained = [x, *moe.parameters()]

    def run(x):
        y, routing = moe(x, mask)
        return y, routing, sum(aux_losses(moe, [routing]).values())

    def with_gradients(function):
        y, routing, aux = function(x)
        return y, routing, aux, torch.autograd.grad(y.square().sum() + aux, trained)

    torch.compiler.reset()
    y, routing, aux, grads = with_gradients(torch.compile(run, fullgraph=True, backend="aot_eager"))
    expected_y, expected_routing, expected_aux, expected_grads = with_gradients(run)
    torch.testing.assert_close((y, aux, grads), (expected_y, expected_aux, expected_grads))
    assert type(routing) is type(expected_routing)
    assert torch.equal(routing.expert_ids, expected_routing.expert_ids)
    assert torch.equal(routing.kept, expected_routing.kept)
    assert routing.context.batch_shape == (3, 4)
