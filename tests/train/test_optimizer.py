import torch
from tiny_training import TinyLM, make_trainer

from himoe.train.optimizer import build_optimizer, decay_groups


def named_groups(model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, undecayed = decay_groups(model, 0.1)
    return {names[p] for p in decayed["params"]}, {names[p] for p in undecayed["params"]}


def test_matrices_decay_and_vectors_do_not():
    decayed, undecayed = named_groups(TinyLM())
    assert {"embedding.weight", "moe.router.gate.weight", "moe.experts.down_proj"} <= decayed
    assert "norm.weight" in undecayed
    assert any("scale" in name for name in undecayed)
    assert not decayed & undecayed


def test_every_trainable_parameter_stands_in_one_group_and_no_balancer_state_in_any():
    model = TinyLM()
    model.norm.weight.requires_grad_(False)
    optimizer = build_optimizer(model, 1e-3)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    buffers = {id(buffer) for buffer in model.buffers()}
    assert buffers and not buffers & set(grouped)


def test_decay_shrinks_matrices_alone():
    trainer = make_trainer(learning_rate=0.1)
    model = trainer.model
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        parameter.data.fill_(1.0)
    trainer.optimizer.step()
    assert torch.allclose(model.embedding.weight, torch.tensor(1 - 0.1 * 0.1))
    assert torch.equal(model.norm.weight, torch.ones(16))


def test_adamw_is_fused():
    assert all(group["fused"] for group in build_optimizer(TinyLM(), 1e-3).param_groups)
