"""Whole models: a decoder language model with any pattern of dense and MoE layers, generation, parameter counts."""

from himoe.models.cache import KVCache
from himoe.models.count import ParameterCounts, parameter_counts
from himoe.models.generation import TextStream, generate
from himoe.models.lm import DecoderLM

__all__ = ["DecoderLM", "KVCache", "ParameterCounts", "TextStream", "generate", "parameter_counts"]
