"""Compiled layers: one graph each, equal to the uncompiled model, in every recompute mode; names stay."""

import copy
import logging

import pytest
import torch
from functorch.compile import make_boxed_func
from small_models import D, make_lm, make_moe, token_ids
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from himoe import Capacity, aux_losses, observe, step
from himoe.nn import SwiGLU

DOCUMENTS = torch.arange(12).expand(2, 12) // 5
MODES = ["none", "selective", "full"]
LAYERS = {
    "hi_moe": lambda _: make_moe("hi_moe"),
    "deepseek_v3, shared expert": lambda _: make_moe("deepseek_v3", num_groups=4, shared_dim=6),
    "loss_free, capacity": lambda _: make_moe("loss_free", dispatcher=Capacity(0.7)),
    "moge and dense": lambda layer: make_moe("moge") if layer else SwiGLU(D, 24),
    "switch": lambda _: make_moe("switch", top_k=1),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def train_step(model, *, document_ids=DOCUMENTS):
    """One micro-batch and the balancers' step: loss, gradients and state."""
    ids = token_ids(2, 12)
    logits, routings = model(ids, document_ids=document_ids)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    (loss + sum(aux_losses(model, routings).values())).backward()
    observe(model, routings)
    step(model)
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return loss.item(), grads, dict(model.named_buffers())


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("hi_moe", "none"),
        ("hi_moe", "full"),
        ("deepseek_v3, shared expert", "selective"),
        ("loss_free, capacity", "selective"),
        ("switch", "full"),
    ],
)
def test_a_layer_is_one_graph_and_equals_eager(name, mode):
    plain, model = (make_lm(LAYERS[name], num_layers=1) for _ in range(2))
    model.recompute = mode
    model.compile_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(train_step(model), train_step(plain))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    plain.load_state_dict(model.state_dict())


def test_generated_code_equals_eager():
    """The default backend, on one layer."""
    plain, model = (make_lm(LAYERS["hi_moe"], num_layers=1) for _ in range(2))
    model.recompute = "selective"
    model.compile_blocks(fullgraph=True)
    torch.testing.assert_close(train_step(model), train_step(plain))


def test_dense_layers_accumulation_and_batches_without_borders():
    plain, model = (make_lm(LAYERS["moge and dense"]) for _ in range(2))
    model.recompute = "selective"
    model.compile_blocks(fullgraph=True, backend="aot_eager")
    for document_ids in (DOCUMENTS, None, DOCUMENTS, None):
        one, other = (train_step(m, document_ids=document_ids) for m in (model, plain))
        torch.testing.assert_close(one, other)
    assert unique_graphs() == 4  # a dense and an MoE layer, with and without borders


def unique_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_under_autocast_and_when_scoring_text(caplog):
    """Training under autocast; evaluation is the uncompiled model's to the bit, and compiles nothing."""
    torch._logging._internal.warning_once.cache_clear()  # what torch says once per process, it may say again
    plain, model = (make_lm(LAYERS["hi_moe"], num_layers=1) for _ in range(2))
    model.recompute = "selective"
    with caplog.at_level(logging.WARNING), torch.autocast("cpu", torch.bfloat16):
        model.compile_blocks(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(train_step(model), train_step(plain), atol=2e-3, rtol=0.05)
    assert not caplog.records
    model.load_state_dict(plain.state_dict())
    before = unique_graphs()
    with torch.no_grad():
        for rows in (5, 3, 2, 1):
            ids = token_ids(rows, 12)
            assert torch.equal(model.eval()(ids)[0], plain.eval()(ids)[0])
    assert unique_graphs() == before > 0
    assert torch.equal(copy.deepcopy(model)(ids)[0], model(ids)[0])


def kept_bytes(mode):
    """Bytes that a compiled layer hands from forward to backward."""
    model = make_lm(LAYERS["hi_moe"], num_layers=1)
    model.recompute = mode
    model.compile_blocks(fullgraph=True, backend="aot_eager_decomp_partition")
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        logits, _ = model(token_ids(4, 32))
    logits.sum().backward()
    return sum(kept.values())


def test_less_is_kept_with_recompute():
    none, selective, full = map(kept_bytes, MODES)
    assert full < selective < none


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_the_routing_is_kept_in_the_compiled_graph(mode):
    """The backward graph takes the forward's choice as an input: it holds neither a selection nor the operator."""
    graphs = {"forward": [], "backward": []}

    def note(which):
        def compiler(graph, _):
            graphs[which].append({str(node.target) for node in graph.graph.nodes})
            return make_boxed_func(graph)

        return compiler

    backend = aot_autograd(
        fw_compiler=note("forward"),
        bw_compiler=note("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    model = make_lm(LAYERS["hi_moe"], num_layers=1)
    model.recompute = mode
    model.compile_blocks(fullgraph=True, backend=backend)
    train_step(model)
    (forward,), (backward,) = graphs["forward"], graphs["backward"]
    assert "himoe.saved_routing.default" in forward
    assert not backward & {"himoe.saved_routing.default", "aten.topk.default"}
    assert ("himoe.expert_mlp.default" in backward) == (mode == "full")
    assert "himoe.expert_mlp_backward.default" in backward


class Opaque(torch.nn.Module):
    """A gate that torch cannot compile."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.gate(x)


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_what_cannot_be_compiled_runs_as_it_is(mode):
    def layer(_):
        moe = make_moe("loss_free")
        moe.router.gate = Opaque(moe.router.gate)
        return moe

    plain, model = (make_lm(layer, num_layers=1) for _ in range(2))
    model.recompute = mode
    model.compile_blocks(backend="aot_eager")
    torch.testing.assert_close(train_step(model), train_step(plain))
