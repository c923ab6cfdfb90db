import pytest
import torch
from tiny_training import equal, make_trainer, weights

from himoe.build import build_model
from himoe.config import load_config
from himoe.train.muon import Muon, orthogonalise
from himoe.train.optimizer import build_optimizer, hidden_matrices
from himoe.train.snapshot import restore, save


def steps(optimizer, parameter, gradients):
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def muon(parameter, rows, **options):
    return Muon([{"params": [parameter], "rows": rows}], lr=0.05, **options)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8), (1, 5)])
def test_one_matrix_goes_as_in_torch(shape):
    gradients = [randn(*shape, seed=i) for i in range(1, 6)]
    mine, theirs = (torch.nn.Parameter(randn(*shape)) for _ in range(2))
    reference = torch.optim.Muon([theirs], lr=0.05, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    expected = steps(reference, theirs, gradients)
    found = steps(muon(mine, shape[:1], momentum=0.9, dtype=torch.bfloat16), mine, gradients)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    full = torch.nn.Parameter(randn(*shape))
    found = steps(muon(full, shape[:1], momentum=0.9), full, gradients)  # fp32 on a CPU
    assert torch.allclose(found, expected, rtol=0, atol=5e-3) and not torch.equal(found, randn(*shape))


def test_each_expert_is_a_matrix_of_its_own():
    gradients = [randn(4, 6, 10, seed=i) * torch.tensor([1.0, 10.0, 100.0, 0.1])[:, None, None] for i in range(1, 4)]
    stacked = torch.nn.Parameter(randn(4, 6, 10))
    together = steps(muon(stacked, (6,)), stacked, gradients)
    for expert in range(4):
        alone = torch.nn.Parameter(randn(4, 6, 10)[expert].clone())
        expected = steps(muon(alone, (6,)), alone, [gradient[expert] for gradient in gradients])
        assert torch.allclose(together[expert], expected, atol=1e-5)


def test_fused_projections_are_matrices_of_their_own():
    gradients = [torch.cat([randn(8, 6, seed=i) * 1000, randn(4, 6, seed=-i)]) for i in range(1, 4)]
    fused = torch.nn.Parameter(randn(12, 6))
    together = steps(muon(fused, (8, 4)), fused, gradients)
    for rows in (slice(0, 8), slice(8, 12)):
        alone = torch.nn.Parameter(randn(12, 6)[rows].clone())
        expected = steps(muon(alone, (rows.stop - rows.start,)), alone, [gradient[rows] for gradient in gradients])
        assert torch.allclose(together[rows], expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (3, 32, 32)])
def test_an_update_is_as_large_as_one_of_adamw(shape):
    """Root mean square 0.2·lr, whatever the shape and the size of the gradient: AdamW's is 0.2 to 0.4 in practice."""
    weight = torch.nn.Parameter(torch.zeros(shape))
    update = steps(muon(weight, shape[-2:-1]), weight, [randn(*shape) * 1e-3])
    assert update.square().mean().sqrt() / 0.05 == pytest.approx(0.2, rel=0.25)


def test_singular_values_come_near_one_and_directions_stay():
    matrix = randn(12, 20)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = u.mT @ orthogonalise(matrix) @ v.mT
    assert found.diag().min() > 0.5 and found.diag().max() < 1.3
    assert (found - found.diag().diag()).abs().max() < 1e-4
    assert torch.equal(orthogonalise(torch.zeros(2, 2)), torch.zeros(2, 2))


def test_weights_decay_by_the_learning_rate_alone():
    weight = torch.nn.Parameter(torch.ones(2, 8))
    steps(muon(weight, (2,), weight_decay=0.5), weight, [torch.zeros(2, 8)])
    assert torch.allclose(weight, torch.tensor(1 - 0.05 * 0.5))


def test_a_matrix_without_a_gradient_only_decays_and_its_momentum_too():
    """Experts 1 and 2 get no tokens after the first step, expert 2 one again in the last; nor does a fused part."""
    gradients = [randn(3, 12, 6, seed=i) for i in range(1, 5)]
    for gradient in gradients[1:]:
        gradient[1] = gradient[2] = 0
        gradient[0, 8:] = 0
    gradients[-1][2] = 1e-6 * randn(12, 6, seed=9)
    weight = torch.nn.Parameter(randn(3, 12, 6))
    optimizer, decay = muon(weight, (8, 4), weight_decay=0.1), 1 - 0.05 * 0.1
    steps(optimizer, weight, gradients[:1])
    for gradient in gradients[1:3]:
        before, momentum = weight.detach().clone(), optimizer.state[weight]["momentum"].clone()
        steps(optimizer, weight, [gradient])
        assert torch.equal(weight[1:], decay * before[1:]) and torch.equal(weight[0, 8:], decay * before[0, 8:])
        assert (weight[0, :8] - decay * before[0, :8]).abs().max() > 1e-3
        assert torch.allclose(optimizer.state[weight]["momentum"][1:], 0.95 * momentum[1:])
    before = weight.detach().clone()
    steps(optimizer, weight, gradients[3:])
    assert (weight[2] - decay * before[2]).abs().max() > 1e-3


def test_all_other_parameters_go_as_in_adamw():
    gradients = [randn(6, 3, seed=i) for i in range(1, 5)]
    mine, theirs = (torch.nn.Parameter(randn(6, 3)) for _ in range(2))
    reference = torch.optim.AdamW([theirs], lr=0.05, betas=(0.8, 0.9), weight_decay=0.2, fused=True)
    optimizer = Muon([{"params": [mine]}], lr=0.05, betas=(0.8, 0.9), weight_decay=0.2)
    assert torch.equal(steps(optimizer, mine, gradients), steps(reference, theirs, gradients))


@pytest.fixture(scope="module")
def model():
    """Layer 0 dense, layer 1 with experts and a shared expert; an untied head and unequal query and key heads."""
    sets = ["moe.every=2", "moe.shared_dim=16", "model.tie_embeddings=false", "moe.options.expert_scale=true"]
    return build_model(load_config("lm_tiny", sets=sets), vocab_size=40)


def test_which_parameter_goes_where(model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    hidden = {names[parameter]: rows for parameter, rows in hidden_matrices(model).items()}
    assert hidden == {
        "blocks.0.attention.qkv_proj.weight": (32, 16, 16),
        "blocks.0.attention.out_proj.weight": (32,),
        "blocks.0.feed_forward.gate_up_proj.weight": (64, 64),
        "blocks.0.feed_forward.down_proj.weight": (32,),
        "blocks.1.attention.qkv_proj.weight": (32, 16, 16),
        "blocks.1.attention.out_proj.weight": (32,),
        "blocks.1.feed_forward.experts.gate_up_proj": (32, 32),
        "blocks.1.feed_forward.experts.down_proj": (32,),
        "blocks.1.feed_forward.shared_expert.gate_up_proj.weight": (16, 16),
        "blocks.1.feed_forward.shared_expert.down_proj.weight": (32,),
    }
    optimizer = build_optimizer(model, 1e-3, optimizer="muon", muon_momentum=0.8, betas=(0.7, 0.9))
    by_muon = {names[p] for group in optimizer.param_groups if group["rows"] for p in group["params"]}
    by_adamw = {names[p] for group in optimizer.param_groups if not group["rows"] for p in group["params"]}
    assert by_muon == set(hidden)
    assert {"embedding.weight", "head.weight", "blocks.1.feed_forward.router.gate.weight"} <= by_adamw
    assert by_muon | by_adamw == set(names.values()) and not by_muon & by_adamw
    assert {(group["momentum"], group["betas"]) for group in optimizer.param_groups} == {(0.8, (0.7, 0.9))}
    undecayed = {names[p] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert undecayed == {name for name, parameter in model.named_parameters() if parameter.ndim < 2}


def test_gates_and_constants_beside_experts_are_adamws():
    pools = "[{ num_experts = 6 }, { num_experts = 2, experts = 'constant' }]"
    sets = [f"moe.pools={pools}", "moe.shared_dim=16", "moe.shared_gate=true", "moe.layers=[0]"]
    built = build_model(load_config("lm_tiny", sets=sets), vocab_size=40)
    names = {parameter: name for name, parameter in built.named_parameters()}
    hidden = {names[parameter].removeprefix("blocks.0.feed_forward.") for parameter in hidden_matrices(built)}
    assert {name for name in hidden if not name.startswith("blocks.")} == {
        "experts.pools.0.gate_up_proj",
        "experts.pools.0.down_proj",
        "shared_expert.network.gate_up_proj.weight",
        "shared_expert.network.down_proj.weight",
    }


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    whole, first = (make_trainer(optimizer="muon") for _ in range(2))
    before = weights(first)
    for trainer, count in ((whole, 5), (first, 2)):
        for _ in range(count):
            trainer.step()
    path = save(first, tmp_path, seconds=1.0, config={}, data_hash="abc", keep=2)
    second = make_trainer(optimizer="muon", seed=99)
    restore(second, path, {}, "abc")
    for _ in range(3):
        second.step()
    assert equal(weights(whole), weights(second)) and not equal(weights(whole), before)


def test_training_lowers_the_loss():
    trainer, losses = make_trainer(optimizer="muon", steps=30), []
    for _ in range(30):
        trainer.step()
        losses.append(trainer.means.read()["loss"])
        trainer.means.reset()
    assert losses[-1] < 0.8 * losses[0]
