"""Whole models: a decoder language model with any pattern of dense and MoE layers, and exact parameter counts."""

from himoe.models.count import ParameterCounts, parameter_counts
from himoe.models.lm import DecoderLM

__all__ = ["DecoderLM", "ParameterCounts", "parameter_counts"]
