"""Planned parameters against the real model's, and published models against their published numbers."""

import pytest
import torch
from planned import MODELS, VARIANTS, planned

from himoe.build import build_model
from himoe.config import load_config, recipe_names
from himoe.data.tokenizer import ByteTokenizer
from himoe.errors import ConfigError
from himoe.models import parameter_counts
from himoe.plan import model_names, named_shape, parameters, shape_of
from himoe.plan.of_config import BYTE_VOCABULARY, places_of
from himoe.train.optimizer import hidden_matrices

pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")


def meta(config, vocab_size):
    with torch.device("meta"):
        return build_model(config, vocab_size)


def agrees(config):
    shape = shape_of(config)
    counts, model = parameters(shape), meta(config, shape.vocab_size)
    real = parameter_counts(model)
    assert (counts.total, counts.active) == (real.total, real.active)
    assert counts.active_without_input_embedding == real.active_without_input_embedding
    assert counts.active_without_embeddings == real.active_without_embeddings
    assert sum(counts.by_role.values()) == real.total
    assert sum(counts.active_by_role.values()) == real.active
    assert counts.hidden_matrices == sum(matrix.numel() for matrix in hidden_matrices(model))
    return model, shape


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_the_parameters_of_its_model(name):
    agrees(load_config(name))


@pytest.mark.parametrize("variant", [*VARIANTS, *MODELS])
def test_every_variant_has_the_parameters_of_its_model(variant):
    config = planned(variant)
    model, shape = agrees(config)
    for layer in model.modules():
        if hasattr(layer, "router"):
            assert layer.router.top_k == places_of(config.moe) == shape.experts.top_k
            assert sum(p.numel() for p in layer.router.parameters()) == shape.experts.gate_parameters


def test_the_vocabulary_of_bytes():
    assert BYTE_VOCABULARY == ByteTokenizer.vocab_size == shape_of(load_config("lm_tiny")).vocab_size


def test_a_tokenizer_in_a_file_has_as_many_tokens_as_are_given():
    config = load_config("lm_tiny", sets=["data.tokenizer=some/tokenizer.json"])
    assert shape_of(config, 1000).vocab_size == 1000
    with pytest.raises(ConfigError, match=r"^data.tokenizer = 'some/tokenizer.json': its file alone knows"):
        shape_of(config)


def test_experts_of_a_readers_own_cannot_be_counted():
    config = load_config("lm_tiny", sets=["moe.experts=mine:Experts"])
    with pytest.raises(ConfigError, match=r"^experts 'mine:Experts' are your own: .* one of swiglu, .*, constant$"):
        shape_of(config)


PUBLISHED = {  # billions: total, active with both embeddings; None where nobody gives the number
    "mixtral_8x7b": (46.703, 12.880),
    "olmoe_1b_7b": (6.919, 1.282),
    "qwen3_30b_a3b": (30.532, 3.353),
    "qwen3_235b": (235.09, None),
    "deepseek_v3": (671.03, 37.55),
    "gpt_oss_120b": (116.83, 5.712),
    "himoe_paper_7b": (6.919, 1.282),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name):
    counts, (total, active) = parameters(named_shape(name)), PUBLISHED[name]
    assert counts.total / 1e9 == pytest.approx(total, rel=1e-3)
    if active is not None:
        assert counts.active / 1e9 == pytest.approx(active, rel=1e-3)


def test_gpt_oss_leaves_out_its_input_embedding():
    assert parameters(named_shape("gpt_oss_120b")).active_without_input_embedding / 1e9 == pytest.approx(5.13, rel=1e-3)


def test_counts_that_are_exact():
    """Of the released weights: the sums of all tensors' sizes."""
    totals = {name: parameters(named_shape(name)).total for name in ("mixtral_8x7b", "olmoe_1b_7b", "qwen3_30b_a3b")}
    assert totals == {
        "mixtral_8x7b": 46_702_792_704,
        "olmoe_1b_7b": 6_919_161_856,
        "qwen3_30b_a3b": 30_532_122_624,
    }


def test_a_tied_model_with_learned_positions():
    counts = parameters(named_shape("himoe_paper_nanogpt"))
    assert counts.by_role["input_embedding"] == 1024 * 1024
    assert counts.active - counts.active_without_input_embedding == 1024 * 1024
    assert counts.active - counts.active_without_embeddings == (1024 + 50304) * 1024
    assert round(counts.total / 1e9, 1) == 1.1


@pytest.mark.parametrize("name", [n for n in model_names() if n.startswith("sd_")])
def test_the_scales_of_slicing_and_dicing_are_called_by_their_active_parameters(name):
    shape, counts = named_shape(name), parameters(named_shape(name))
    square = shape.num_layers * shape.dim**2
    router_and_norms = shape.num_layers * shape.dim + (2 * shape.num_layers + 1) * shape.dim
    assert counts.active == counts.total == 2 * 100_352 * shape.dim + 16 * square + router_and_norms
    assert counts.active / 1e6 == pytest.approx(float(name[3:-1]), rel=0.06)
