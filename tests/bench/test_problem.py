import pytest
import torch

from himoe.bench.problem import answer, draw_choice, make_problem, reroute
from himoe.bench.shapes import FULL, FULL_GPU, QUICK, SHAPES, Shape, cases, parse_shape, plan
from himoe.errors import ConfigError
from himoe.functional import reference

SHAPE = Shape("", tokens=400, dim=8, hidden_dim=12, num_experts=16, top_k=4)


def loads(routing, seed=0):
    choice = draw_choice(SHAPE, routing, torch.Generator().manual_seed(seed))
    ids = choice.expert_ids
    assert all(len(set(row)) == SHAPE.top_k for row in ids.tolist())
    assert torch.allclose(choice.weights.sum(-1), torch.ones(SHAPE.tokens))
    return torch.bincount(ids.flatten(), minlength=SHAPE.num_experts).double()


def test_routings_are_as_skewed_as_they_say():
    uniform, zipf, one_hot = loads("uniform"), loads("zipf"), loads("one_hot")
    assert uniform.max() / uniform.mean() < 1.5
    assert zipf.max() / zipf.mean() > 2 and zipf.min() / zipf.mean() < 0.5
    assert one_hot.count_nonzero() == SHAPE.top_k and one_hot.max() == SHAPE.tokens


def test_zipfs_odds_are_those_of_the_law():
    shape = Shape("", tokens=40_000, dim=1, hidden_dim=1, num_experts=4, top_k=1)
    choice = draw_choice(shape, "zipf", torch.Generator().manual_seed(0))
    shares = torch.bincount(choice.expert_ids.flatten()).double().sort(descending=True).values / shape.tokens
    law = torch.tensor([1, 1 / 2, 1 / 3, 1 / 4], dtype=torch.float64)
    assert torch.allclose(shares, law / law.sum(), atol=0.01)


def test_the_same_seed_draws_the_same_problem():
    one, two, other = (make_problem(SHAPE, "fp32", "zipf", seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(one.leaves[name], two.leaves[name]) for name in one.leaves)
    assert torch.equal(one.expert_ids, two.expert_ids) and not torch.equal(one.x, other.x)


@pytest.mark.parametrize("routing", ["uniform", "one_hot"])
def test_the_answer_is_that_of_the_double_loop(routing):
    shape = Shape("", tokens=9, dim=5, hidden_dim=3, num_experts=7, top_k=2)
    problem = make_problem(shape, "fp32", routing)
    leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in problem.leaves.items()}
    y = reference.moe(
        leaves["x"],
        problem.expert_ids,
        leaves["weights"],
        problem.kept,
        leaves["up_proj"],
        leaves["down_proj"],
        "swiglu",
    )
    y.backward(problem.grad.double())
    found = answer(problem)
    assert torch.allclose(found["y"].double(), y, rtol=1e-6, atol=1e-7)
    for name, leaf in leaves.items():
        assert torch.allclose(found[name].double(), leaf.grad, rtol=1e-5, atol=1e-6), name


def test_flops_are_those_of_the_dense_network():
    assert SHAPE.flops == 18 * 400 * 4 * 8 * 12
    assert SHAPE.weight_bytes == 4 * 16 * 3 * 8 * 12


def test_shapes_have_names_or_five_numbers():
    assert parse_shape("e64").record() == {"name": "e64", "T": 1024, "D": 256, "F": 256, "E": 64, "K": 8}
    assert parse_shape("8x4x2x6x3").top_k == 3
    for wrong in ("e65", "1,2,3", "1,2,3,4,5", "0,2,3,4,1", "a,b,c,d,e"):
        with pytest.raises(ConfigError, match="--shape"):
            parse_shape(wrong)


def test_plans_name_shapes_that_are_there_and_spell_out():
    assert all(name in SHAPES for name, _, _ in FULL + FULL_GPU + QUICK)
    assert {name for name, _, _ in QUICK} <= {name for name, _, _ in FULL}
    assert len(cases(QUICK, (), ())) == sum(len(dtypes) * len(routings) for _, dtypes, routings in QUICK)
    assert {case[1:] for case in cases(QUICK, ("bf16",), ("zipf",))} == {("bf16", "zipf")}
    assert plan("cpu", quick=True, names=("1,2,3,4,1",)) == [("1,2,3,4,1", ("fp32",), ("uniform",))]
    assert plan("cuda", quick=False, names=("1,2,3,4,1",))[0][1] == ("bf16",)
    assert plan("cpu", quick=False, names=("e64",)) == [("e64", ("fp32",), ("uniform", "zipf"))]


def test_shapes_for_a_laptop_fit_one():
    assert max(SHAPES[name].weight_bytes for name, _, _ in FULL) < 2**29


def test_another_routing_of_the_same_problem_is_the_one_that_would_be_drawn_alone():
    uniform = make_problem(SHAPE, "fp32", "uniform", seed=3)
    zipf, alone = reroute(uniform, "zipf", seed=3), make_problem(SHAPE, "fp32", "zipf", seed=3)
    assert torch.equal(zipf.expert_ids, alone.expert_ids) and torch.equal(zipf.weights, alone.weights)
    assert zipf.weights.is_leaf and zipf.weights.requires_grad and zipf.weights is not uniform.weights
    assert zipf.x is uniform.x and zipf.up_proj is uniform.up_proj and zipf.down_proj is uniform.down_proj
