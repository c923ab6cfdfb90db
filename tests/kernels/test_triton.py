"""The Triton kernels of the expert MLP against the double loop over tokens: values and gradients, odd shapes."""

import pytest
import torch
import triton_here
from expert_case import NAMES, assert_equal, make_case, run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_expert_mlp import CASES
from triton_here import poisoned_memory

from himoe.functional.dispatch import sort_by_expert
from himoe.kernels import choose_backend, expert_mlp
from himoe.kernels import triton as backend
from himoe.kernels.activation import ACTIVATIONS
from himoe.kernels.triton import blocks, mlp

pytestmark = triton_here.marks
DEVICE = triton_here.DEVICE
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
MORE_CASES = {
    "experts of several tiles": {"tokens": 90, "num_experts": 3, "k": 2},
    "one expert has all, several tiles": {"tokens": 50, "spread": "one", "k": 1, "kept": "all"},
    "a block and one more": {"tokens": 17, "width": 33, "units": 17, "num_experts": 2, "k": 1, "kept": "all"},
    "exactly a block": {"tokens": 16, "width": 16, "units": 16, "num_experts": 1, "k": 1, "kept": "all"},
    "more experts than pairs": {"tokens": 2, "num_experts": 40, "k": 1},
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", [*CASES, *MORE_CASES])
def test_values_and_gradients_are_the_references(name, dtype):
    case = make_case(**(CASES | MORE_CASES)[name])
    x, *_, up_proj, down_proj = case.arguments(dtype, DEVICE)
    assert choose_backend("triton", x, up_proj, down_proj) == "triton"
    with poisoned_memory():
        result = run(case, backend="triton", dtype=dtype, device=DEVICE)
    assert result[0].dtype == dtype and all(g.dtype == dtype for g in result[1].values())
    assert_equal(result, run(case, backend="reference"), TOLERANCE[dtype])


@settings(max_examples=8, deadline=None)
@given(
    st.data(),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 6),
    st.sampled_from(list(ACTIVATIONS)),
    st.sampled_from(["all", "few", "one"]),
    st.integers(0, 100),
)
def test_random_shapes(data, tokens, width, units, num_experts, activation, spread, seed):
    k = data.draw(st.integers(1, num_experts))
    case = make_case(tokens, width, units, num_experts, k, spread=spread, activation=activation, seed=seed)
    with poisoned_memory():
        result = run(case, backend="triton", dtype=torch.float32, device=DEVICE)
    assert_equal(result, run(case, backend="reference"), TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    "trained",
    [("x",), ("weights",), ("up_proj",), ("down_proj",), ("x", "weights"), ("weights", "down_proj"), NAMES[1:]],
)
def test_frozen_parts_change_no_other_gradient(trained):
    case = make_case()
    y, everything = run(case, backend="reference")
    with poisoned_memory():
        some = run(case, backend="triton", dtype=torch.float32, trained=trained, device=DEVICE)
    assert_equal(some, (y, {name: everything[name] for name in trained}), 1e-5)


def test_strides_of_the_weights_do_not_matter():
    case = make_case(tokens=20, width=24, units=20, num_experts=3, k=2)
    expected = run(case, backend="reference")
    for name in ("up_proj", "down_proj"):
        setattr(case, name, getattr(case, name).transpose(1, 2).contiguous().transpose(1, 2))
    result = run(case, backend="triton", dtype=torch.float32, device=DEVICE)
    assert_equal(result, expected, 1e-5)


def test_rows_of_unkept_pairs_are_never_read():
    case = make_case(tokens=30, num_experts=4, k=2, kept="some")
    case.kept[:5] = False
    case.x[:5] = torch.nan  # tokens none of whose pairs is kept
    case.weights = case.weights.where(case.kept, torch.nan)
    y, grads = run(case, backend="triton", dtype=torch.float32, device=DEVICE)
    assert y.isfinite().all() and all(g.isfinite().all() for g in grads.values())
    assert not y[:5].any() and not grads["x"][:5].any() and not grads["weights"][~case.kept].any()


def test_tiles_cover_every_kept_row_once_and_leave_the_rest_empty():
    counts = [0, 5, 16, 0, 33, 1]
    ids = torch.repeat_interleave(torch.arange(6), torch.tensor(counts))[:, None]
    kept = torch.ones_like(ids, dtype=torch.bool)
    rows = sort_by_expert(torch.cat([ids, ids[:9]]).to(DEVICE), torch.cat([kept, ~kept[:9]]).to(DEVICE), 6)
    shape = blocks.ShapeClass(16, 16, 32, "float32", blocks.INTERPRETER)
    tiles = mlp.Pairs(rows, 1, shape).tiles(16).tolist()
    assert tiles[:6] == [[1, 0], [2, 5], [4, 21], [4, 37], [4, 53], [5, 54]]
    assert len(tiles) == 64 // 16 + 6 and all(expert == -1 for expert, _ in tiles[6:])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_results_repeat_bit_for_bit(activation):
    def once():
        case = make_case(tokens=40, num_experts=3, activation=activation)
        y, grads = run(case, backend="triton", dtype=torch.float32, device=DEVICE)
        return y, *grads.values()

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def test_autocast_computes_in_bf16_and_trains_fp32_parameters():
    x, ids, weights, kept, up, down = make_case().arguments(torch.float32, DEVICE)
    leaves = [t.requires_grad_() for t in (x, weights, up, down)]
    with torch.autocast(DEVICE, torch.bfloat16):
        y = expert_mlp(x, ids, weights, kept, up, down, backend="triton")
    y.backward(torch.linspace(-1, 2, y.numel()).view_as(y).to(y))
    assert y.dtype == torch.bfloat16 and all(leaf.grad.dtype == torch.float32 for leaf in leaves)
    grads = dict(zip(NAMES, (leaf.grad.cpu() for leaf in leaves), strict=True))
    assert_equal((y.detach().cpu(), grads), run(make_case(), backend="reference"), 4e-2)


def test_it_runs_where_it_can_and_leaves_the_rest_to_the_loop(monkeypatch):
    x, *_, up, down = make_case(width=5, units=3).arguments(torch.float32, DEVICE)
    assert choose_backend("triton", x, up, down) == "triton"
    assert choose_backend("triton", x.double(), up.double(), down.double()) == "loop"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choose_backend("triton", x.cpu(), up.cpu(), down.cpu()) == "loop"


def test_a_gpu_without_triton_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(backend, "installed", lambda: False)
    with pytest.raises(backend.ConfigError, match=r"pip install 'himoe\[triton\]'"):
        backend.runs_on(torch.device("cuda"))
    assert not backend.runs_on(torch.device("cpu")) and not backend.runs_on(torch.device("meta"))
