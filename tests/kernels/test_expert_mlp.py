"""Every backend of the expert MLP against the double loop over tokens: values and gradients, in every odd shape."""

import contextlib

import pytest
import torch
from expert_case import NAMES, assert_equal, make_case, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from himoe.errors import ConfigError
from himoe.functional import reference
from himoe.functional.dispatch import sort_by_expert
from himoe.kernels import BACKENDS, choose_backend, expert_mlp, native, sort_pairs
from himoe.kernels.activation import ACTIVATIONS

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}
RUNS = [
    ("loop", torch.float64),
    ("loop", torch.float32),
    ("loop", torch.bfloat16),
    ("grouped", torch.float32),
    ("grouped", torch.bfloat16),
    ("native", torch.float32),
    ("native", torch.bfloat16),
]
CASES = {
    "one token": {"tokens": 1, "kept": "all"},
    "no token": {"tokens": 0},
    "every expert": {"num_experts": 4, "k": 4, "kept": "all"},
    "one expert": {"num_experts": 1, "k": 1},
    "experts without tokens": {"spread": "few", "kept": "all"},
    "all tokens to one expert": {"spread": "one", "k": 1, "kept": "all"},
    "several choices of one expert": {"spread": "one", "k": 3, "kept": "some"},
    "nothing kept": {"kept": "none"},
    "some kept": {"tokens": 40, "num_experts": 9, "k": 3},
    "odd sizes": {"width": 5, "units": 3},
    "sizes of one": {"width": 1, "units": 1},
    "gelu": {"activation": "gelu"},
    "gelu, odd sizes, some kept": {"activation": "gelu", "width": 7, "units": 11, "k": 3},
    "relu": {"activation": "relu"},
    "relu, odd sizes, some kept": {"activation": "relu", "width": 7, "units": 11, "k": 3},
    "relu2": {"activation": "relu2"},
    "relu2, odd sizes, some kept": {"activation": "relu2", "width": 7, "units": 11, "k": 3},
}


@contextlib.contextmanager
def poisoned_memory():
    """Make `torch.empty` return NaN, so that reading a row that nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("backend", "dtype"), RUNS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_references(name, backend, dtype):
    case = make_case(**CASES[name])
    with poisoned_memory():
        result = run(case, backend=backend, dtype=dtype)
    assert result[0].dtype == dtype
    assert all(g.dtype == dtype for g in result[1].values())
    assert_equal(result, run(case, backend="reference"), TOLERANCE[dtype])


@settings(max_examples=30, deadline=None)
@given(
    st.data(),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 6),
    st.sampled_from(list(ACTIVATIONS)),
    st.sampled_from(["all", "some"]),
    st.sampled_from(["all", "few"]),
    st.integers(0, 100),
)
def test_random_shapes(data, tokens, width, units, num_experts, activation, kept, spread, seed):
    k = data.draw(st.integers(1, num_experts))
    backend, dtype = data.draw(
        st.sampled_from([("loop", torch.float64), ("grouped", torch.float32), ("native", torch.float32)])
    )
    scale = 4 if backend == "grouped" else 1  # rows of 16 bytes, which grouped needs
    case = make_case(
        tokens, width * scale, units * scale, num_experts, k, kept=kept, spread=spread, activation=activation, seed=seed
    )
    with poisoned_memory():
        result = run(case, backend=backend, dtype=dtype)
    assert_equal(result, run(case, backend="reference"), TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    case = make_case(tokens=4, width=3, units=2, num_experts=3, k=2, activation=activation)
    x, ids, weights, kept, up_proj, down_proj = case.arguments()
    inputs = [t.requires_grad_() for t in (x, weights, up_proj, down_proj)]

    def function(x, weights, up_proj, down_proj):
        return expert_mlp(x, ids, weights, kept, up_proj, down_proj, activation=activation, backend="loop")

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize(("backend", "dtype"), [("loop", torch.float64), *RUNS[3:]])
@pytest.mark.parametrize(
    "trained",
    [("x",), ("weights",), ("up_proj",), ("down_proj",), ("x", "weights"), ("weights", "down_proj"), NAMES[1:]],
)
def test_frozen_parts_change_no_other_gradient(backend, dtype, trained):
    case = make_case()
    _, everything = run(case, backend="reference")
    y, some = run(case, backend=backend, dtype=dtype, trained=trained)
    expected = run(case, backend="reference")[0], {name: everything[name] for name in trained}
    assert_equal((y, some), expected, TOLERANCE[dtype])


def test_nothing_trained_builds_no_graph():
    arguments = make_case().arguments()
    assert not expert_mlp(*arguments, backend="loop").requires_grad


@pytest.mark.parametrize(("backend", "dtype"), [("loop", torch.float64), *RUNS[3:]])
def test_strides_do_not_matter(backend, dtype):
    case = make_case(tokens=6, width=8, units=8, num_experts=4, k=2)
    expected = run(case, backend="reference", upstream=torch.ones(6, 8))
    strided = make_case(tokens=6, width=8, units=8, num_experts=4, k=2)
    strided.x = case.x.T.contiguous().T
    strided.expert_ids = case.expert_ids.T.contiguous().T
    strided.weights = case.weights.T.contiguous().T
    strided.kept = case.kept.T.contiguous().T
    strided.up_proj = case.up_proj.transpose(1, 2).contiguous().transpose(1, 2)
    strided.down_proj = case.down_proj.transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(t.is_contiguous() for t in strided.arguments(dtype))
    result = run(strided, backend=backend, dtype=dtype, upstream=torch.ones(1, 1).expand(6, 8))
    assert_equal(result, expected, TOLERANCE[dtype])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 40), st.integers(1, 6), st.integers(1, 4), st.sampled_from(["all", "some", "none"]), st.booleans()
)
def test_native_sorts_pairs_as_the_others_do(tokens, num_experts, k, kept, strided):
    case = make_case(tokens, 1, 1, num_experts, min(k, num_experts), kept=kept, seed=tokens)
    ids, chosen = (t.T.contiguous().T if strided else t for t in (case.expert_ids, case.kept))
    for one, other in zip(
        sort_pairs("native", ids, chosen, num_experts), sort_by_expert(ids, chosen, num_experts), strict=True
    ):
        assert torch.equal(one, other) and one.dtype == other.dtype


@pytest.mark.parametrize("backend", ["loop", "grouped", "native"])
def test_ids_in_32_bits_are_as_good(backend):
    x, ids, *rest = make_case().arguments(torch.float32)
    expected = expert_mlp(x, ids, *rest, backend=backend)
    assert torch.equal(expert_mlp(x, ids.int(), *rest, backend=backend), expected)


@pytest.mark.parametrize("backend", ["loop", "grouped", "native"])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_an_expert_that_is_not_there_is_refused(backend, kept, wrong):
    x, ids, weights, chosen, up_proj, down_proj = make_case(num_experts=5).arguments(torch.float32)
    ids[3, 1], chosen[3, 1] = wrong, kept
    with pytest.raises((ConfigError, RuntimeError), match=r"not in 0 … 4|out of bounds"):
        expert_mlp(x, ids, weights, chosen, up_proj, down_proj, backend=backend)


@pytest.mark.parametrize("backend", ["loop", "grouped", "native"])
def test_arguments_in_each_others_place_are_refused(backend):
    x, ids, weights, kept, *projections = make_case().arguments(torch.float32)
    for wrong in ((x, ids, kept, weights), (x, weights, weights, kept), (x, ids, weights, kept.to("meta"))):
        with pytest.raises((RuntimeError, TypeError)):
            expert_mlp(*wrong, *projections, backend=backend)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_whoever_watches_operators_sees_the_sort():
    def sort_by_native(ids, kept):
        return tuple(sort_pairs("native", ids, kept, 5))

    ids, kept = make_case().expert_ids, make_case().kept
    for mode in ("real", "fake"):
        graph = make_fx(sort_by_native, tracing_mode=mode)(ids, kept)
        assert all(map(torch.equal, graph(ids.flip(0), kept), sort_by_native(ids.flip(0), kept)))
    assert all(map(torch.equal, torch.func.functionalize(sort_by_native)(ids, kept), sort_by_native(ids, kept)))
    traced = torch.jit.trace(sort_by_native, (ids, kept))
    assert all(map(torch.equal, traced(ids.flip(0), kept), sort_by_native(ids.flip(0), kept)))


def test_weights_of_a_finer_dtype_than_the_tokens_keep_it_in_their_gradient():
    x, ids, weights, kept, up_proj, down_proj = make_case().arguments(torch.bfloat16)
    weights = weights.float().requires_grad_()
    y = expert_mlp(x, ids, weights, kept, up_proj, down_proj)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and weights.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_autocast_computes_in_bf16_and_trains_fp32_parameters(backend, where):
    case = make_case()
    x, ids, weights, kept, up_proj, down_proj = case.arguments(torch.float32)
    leaves = [t.requires_grad_() for t in (x, weights, up_proj, down_proj)]
    with torch.autocast("cpu", torch.bfloat16):
        y = expert_mlp(x, ids, weights, kept, up_proj, down_proj, backend=backend)
        assert y.dtype == torch.bfloat16
        upstream = torch.linspace(-1, 2, y.numel()).view_as(y).to(y.dtype)
        if where == "inside":
            y.backward(upstream)
    if where == "outside":
        y.backward(upstream)
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)
    grads = dict(zip(NAMES, (leaf.grad for leaf in leaves), strict=True))
    assert_equal((y.detach(), grads), run(case, backend="reference"), TOLERANCE[torch.bfloat16])


def test_grouped_runs_where_rows_are_multiples_of_16_bytes_and_falls_back_elsewhere():
    def chosen(width, units, dtype, activation="swiglu"):
        x, _, _, _, up_proj, down_proj = make_case(width=width, units=units, activation=activation).arguments(dtype)
        return choose_backend("grouped", x, up_proj, down_proj)

    assert chosen(4, 4, torch.float32) == "grouped"
    assert chosen(8, 8, torch.bfloat16) == "grouped"
    assert chosen(4, 8, torch.bfloat16) == "loop"
    assert chosen(8, 4, torch.bfloat16) == "loop"
    assert chosen(4, 6, torch.float32, "gelu") == "loop"
    assert chosen(8, 8, torch.float64) == "loop"


@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_relus_have_no_slope_at_zero(activation, backend):
    case = make_case(width=8, units=4, activation=activation, kept="all")
    case.x[2] = 0  # every hidden unit of this token is exactly 0
    y, grads = run(case, backend=backend, dtype=torch.float32)
    assert_equal((y, grads), run(case, backend="reference"), TOLERANCE[torch.float32])
    assert not y[2].any() and not grads["x"][2].any()


def test_auto_on_a_cpu_is_native_where_it_can_run_and_else_the_loop():
    def chosen(dtype, backend="auto"):
        x, _, _, _, up_proj, down_proj = make_case().arguments(dtype)
        return choose_backend(backend, x, up_proj, down_proj)

    able = "native" if native.available() else "loop"
    assert chosen(torch.float32) == chosen(torch.float32, "native") == able
    assert chosen(torch.bfloat16) == chosen(torch.bfloat16, "native") == able
    assert chosen(torch.float64) == chosen(torch.float64, "native") == "loop"
    assert chosen(torch.float16) == "loop"


def test_a_second_derivative_is_refused_not_wrong():
    x, *rest = make_case().arguments()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(expert_mlp(x, *rest).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="expert_mlp_backward"):
        grad.sum().backward()


def test_the_reference_is_the_formula():
    # one token, F = 1: swiglu 3·silu(2·1)·(−1·1)·½, the others 3·act(2·1)·½
    x, one = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    weight, down = torch.full((1, 1), 0.5, dtype=torch.float64), torch.full((1, 1, 1), 3.0, dtype=torch.float64)
    up = torch.tensor([[[2.0], [-1.0]]], dtype=torch.float64)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    swiglu = reference.moe(x, ids, weight, one, up, down, "swiglu").item()
    gelu = reference.moe(x, ids, weight, one, up[:, :1], down, "gelu").item()
    assert swiglu == pytest.approx(-1.5 * 2 * 0.8807970779778823)  # sigmoid(2)
    assert gelu == pytest.approx(1.5 * 2 * 0.9772498680518208)  # Φ(2)
    assert reference.moe(x, ids, weight, one, up[:, :1], down, "relu").item() == 1.5 * 2
    assert reference.moe(x, ids, weight, one, up[:, :1], down, "relu2").item() == 1.5 * 4
    assert reference.moe(x, ids, weight, one, up[:, 1:], down, "relu2").item() == 0


ERRORS = [
    ({"backend": "cuda"}, "backend = 'cuda': must be auto, loop, grouped, native, triton"),
    ({"activation": "tanh"}, "activation = 'tanh': must be swiglu or gelu or relu or relu2"),
    ({"activation": "gelu"}, r"gelu needs x \(T, 16\) and up_proj \(5, 8, 16\)"),
    ({"x": (7, 15)}, r"x \(7, 15\), up_proj \(5, 16, 16\) and down_proj \(5, 16, 8\) do not fit"),
    ({"up_proj": (4, 16, 16)}, r"up_proj \(4, 16, 16\)"),
    ({"down_proj": (5, 16, 7)}, r"swiglu needs x \(T, 16\) and up_proj \(5, 14, 16\)"),
    ({"x": (1, 7, 16)}, r"x \(1, 7, 16\) must be \(T, D\)"),
    ({"weights": (7, 1)}, r"weights \(7, 1\).* all \(T, K\) with the same T"),
    ({"weights": (7, 4)}, r"weights \(7, 4\)"),
    ({"kept": (6, 2)}, r"kept \(6, 2\)"),
    ({"x": (6, 16)}, r"x \(6, 16\) .* expert_ids \(7, 2\)"),
    ({"down_proj": (5, 16, 0), "up_proj": (5, 0, 16)}, r"down_proj \(5, 16, 0\) must be \(E, D, F\), none of them 0"),
    ({"expert_ids": (7, 0), "weights": (7, 0), "kept": (7, 0)}, "with the same T, K ≥ 1"),
]


@pytest.mark.parametrize("backend", ["auto", "loop", "grouped", "native"])
@pytest.mark.parametrize("narrow", ["x", "up_proj", "down_proj"])
def test_tensors_of_several_dtypes_are_refused(backend, narrow):
    names = ("x", "expert_ids", "weights", "kept", "up_proj", "down_proj")
    arguments = dict(zip(names, make_case().arguments(torch.float32), strict=True))
    arguments[narrow] = arguments[narrow].bfloat16()
    with pytest.raises(ConfigError, match="all must be the same, or use autocast"):
        expert_mlp(**arguments, backend=backend)


@pytest.mark.parametrize("backend", ["loop", "grouped", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_of_an_unkept_pair_may_be_anything(backend, dtype):
    x, ids, weights, kept, up, down = make_case(kept="some").arguments(dtype)
    assert not kept.all()
    expected = expert_mlp(x, ids, weights, kept, up, down, backend=backend)
    found = expert_mlp(x, ids, weights.where(kept, torch.nan), kept, up, down, backend=backend)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_fp16_weighs_before_it_rounds(backend):
    one = torch.ones(1, 1, dtype=torch.float16)
    up, down = torch.full((1, 8, 8), 16.0, dtype=torch.float16), torch.full((1, 8, 8), 64.0, dtype=torch.float16)
    x = torch.ones(1, 8, dtype=torch.float16)
    y = expert_mlp(x, one.long() * 0, one / 8, one.bool(), up, down, activation="relu", backend=backend)
    assert y.tolist() == [[8 * 64 * 128 / 8] * 8]  # 65536 before the weight, more than fp16 holds


def test_projections_that_are_views_compile():
    x, ids, weights, kept, up, down = make_case(kept="all").arguments(torch.float32)
    given = [up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()]

    def gradients(function):
        leaves = [t.clone().requires_grad_() for t in given]
        y = function(x, ids, weights, kept, *(t.transpose(1, 2) for t in leaves))
        return torch.autograd.grad(y.square().sum(), leaves)

    torch.compiler.reset()
    torch.testing.assert_close(
        gradients(torch.compile(expert_mlp, fullgraph=True, backend="aot_eager")), gradients(expert_mlp)
    )


@pytest.mark.parametrize(("change", "message"), ERRORS)
def test_what_does_not_fit_is_named(change, message):
    names = ("x", "expert_ids", "weights", "kept", "up_proj", "down_proj")
    arguments = dict(zip(names, make_case(kept="all").arguments(torch.float32), strict=True))
    arguments |= {n: torch.zeros(v, dtype=arguments[n].dtype) if isinstance(v, tuple) else v for n, v in change.items()}
    with pytest.raises(ConfigError, match=message):
        expert_mlp(**arguments)
