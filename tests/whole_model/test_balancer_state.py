"""Balancer state in a whole model: when it moves, in what dtype, where it is saved, who owns it."""

import copy

import pytest
import torch
from router_zoo import E, G, everything, make_model, optimizer_step, same, state_of, token_ids

import himoe
from himoe import MoE, Router, SwiGLUExperts
from himoe.balance import Balancer
from himoe.functional import stats
from himoe.train.optimizer import build_optimizer

pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")
STATE = {"mean_logits", "multipliers", "num_steps", "bias", "momentum", "cutoff", "multiplier", "mean_probabilities"}
COUNTS = {"counts", "distances", "excess"}


def trained(name: str = "everything", steps: int = 2, **options):
    model = make_model(name, **options)
    for step in range(steps):
        optimizer_step(model, token_ids(seed=step))
    return model


def test_the_model_with_everything_has_every_kind_of_state():
    names = {name.rsplit(".", 1)[-1] for name in state_of(make_model("everything"))}
    assert names == STATE


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_one_move_per_optimizer_step(micro_batches):
    model = make_model("everything")
    layer = himoe.moe_layers(model)[0].router.balancer
    optimizer_step(model, *[token_ids(seed=seed) for seed in range(micro_batches)])
    buffers = {name.rsplit(".", 1)[-1]: buffer for name, buffer in layer.named_buffers()}
    assert buffers["num_steps"].item() == 1
    bias = buffers["bias"]
    assert torch.isin((bias / 0.01).round(), torch.tensor([-1.0, 0.0, 1.0])).all() and bias.any()


def test_forward_backward_and_eval_move_nothing():
    model = trained()
    before = state_of(model)
    for _ in range(2):
        logits, _ = model(token_ids(seed=7))
        logits.sum().backward()
    model.eval()
    with torch.no_grad():
        _, routings = model(token_ids(seed=8))
    himoe.observe(model, routings)  # validation that calls everything by mistake
    assert same(before, state_of(model))
    assert not any(m.sums for m in model.modules() if isinstance(m, Balancer))
    schedules = {name for name in before if name.endswith("num_steps")}
    himoe.step(model)  # nothing was observed: only the counters of optimizer steps go on
    after = state_of(model)
    assert all(torch.equal(before[name], after[name]) for name in before if name not in schedules)


def test_validation_between_two_micro_batches_changes_nothing():
    plain, disturbed = make_model("everything"), make_model("everything")
    for model in (plain, disturbed):
        for seed in range(2):
            _, routings = model.train()(token_ids(seed=seed))
            himoe.observe(model, routings)
            if model is disturbed:
                _, validation = model.eval()(token_ids(seed=99))
                himoe.observe(model, validation)
        himoe.step(model)
    assert same(state_of(plain), state_of(disturbed))


def test_state_moves_in_place():
    model = make_model("everything")
    before, addresses = state_of(model), {name: b.data_ptr() for name, b in model.named_buffers()}
    optimizer_step(model, token_ids())
    assert {name: b.data_ptr() for name, b in model.named_buffers()} == addresses
    after = state_of(model)
    assert not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.double()]
)
def test_state_keeps_its_dtype_and_values_when_the_model_is_cast(cast):
    model = trained(dtype=torch.float32)
    before = state_of(model)
    cast(model)
    after = state_of(model)
    assert same(before, after)
    for name, buffer in after.items():
        assert buffer.dtype == (torch.int64 if name.endswith("num_steps") else torch.float32), name
    assert model.embedding.weight.dtype != torch.float32


def test_a_bf16_model_makes_fp32_moves():
    model = trained(steps=3, dtype=torch.bfloat16)
    bias = himoe.moe_layers(model)[0].router.balancer.parts[-1].bias
    assert bias.dtype == torch.float32
    # 0.01 and 0.03 have no bf16 neighbour closer than 1e-5
    steps = bias.double() / 0.01
    assert (steps - steps.round()).abs().max() < 1e-5 and bias.any()


def test_counts_are_integers_and_sums_are_fp64():
    model = make_model("everything", dtype=torch.float32)
    _, routings = model(token_ids())
    himoe.observe(model, routings)
    sums = {n: v.dtype for m in model.modules() if isinstance(m, Balancer) for n, v in m.sums.items()}
    assert sums.keys() >= COUNTS
    assert {dtype for name, dtype in sums.items() if name in COUNTS} == {torch.int64}
    assert {dtype for name, dtype in sums.items() if name not in COUNTS} == {torch.float64}


def test_state_is_saved_and_restored():
    model = trained()
    restored = make_model("everything", seed=5)
    restored.load_state_dict(copy.deepcopy(model.state_dict()))
    assert same(state_of(model), state_of(restored))
    for continued in (model, restored):
        optimizer_step(continued, token_ids(seed=20))
    assert same(model.state_dict(), restored.state_dict())


def test_accumulators_are_neither_buffers_nor_saved():
    model = make_model("everything")
    before = set(model.state_dict())
    _, routings = model(token_ids())
    himoe.observe(model, routings)
    assert any(m.sums for m in model.modules() if isinstance(m, Balancer))
    assert set(model.state_dict()) == before
    assert {name.rsplit(".", 1)[-1] for name, _ in model.named_buffers()} == STATE


def test_state_never_stands_in_an_optimizer_group():
    model = make_model("everything")
    owned = {id(p) for group in build_optimizer(model, 1e-3).param_groups for p in group["params"]}
    assert not owned & {id(buffer) for buffer in model.buffers()}
    for layer in himoe.moe_layers(model):
        assert not list(layer.router.balancer.parameters())
    assert not any(buffer.requires_grad for buffer in model.buffers())


def test_a_model_built_on_the_meta_device_starts_where_any_other_does():
    with torch.device("meta"):
        model = make_model("everything", dtype=torch.float32)
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.fill_(9)
    model.reset_parameters()
    assert same(state_of(model), state_of(make_model("everything", dtype=torch.float32)))
    scale = himoe.moe_layers(model)[0].router.expert_scale
    assert torch.equal(scale, torch.ones(E))


def test_state_survives_a_copy_of_the_model():
    model = trained()
    twin = copy.deepcopy(model)
    for one in (model, twin):
        optimizer_step(one, token_ids(seed=3))
    assert same(state_of(model), state_of(twin))
    optimizer_step(twin, token_ids(seed=4))
    assert not same(state_of(model), state_of(twin))


def test_loads_of_micro_batches_add_up_exactly():
    """A layer's bias follows the counts of the whole step, whichever way it was cut."""
    torch.manual_seed(0)
    router = himoe.presets.hi_moe(8, E, G, num_groups=G)
    router.balancer = everything()
    layer = MoE(router, SwiGLUExperts(E, 8, 4))
    x = torch.randn(60, 8)
    whole = stats.load(layer(x)[1])
    parts = sum(stats.load(layer(piece)[1]) for piece in x.split([7, 30, 23]))
    assert torch.equal(whole, parts) and whole.dtype == torch.int64
    assert isinstance(layer.router, Router)
