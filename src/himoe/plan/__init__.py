"""What a model costs before it is built: parameters, FLOPs, memory, and the use of its experts. Imports no torch."""

from himoe.plan.count import Flops, Parameters, flops, parameters
from himoe.plan.memory import Memory, Ranks, memory
from himoe.plan.models import model_names, named_shape
from himoe.plan.of_config import shape_of
from himoe.plan.search import search
from himoe.plan.shape import Shape
from himoe.plan.slicing import sliced
from himoe.plan.summary import summarize

__all__ = [
    "Flops",
    "Memory",
    "Parameters",
    "Ranks",
    "Shape",
    "flops",
    "memory",
    "model_names",
    "named_shape",
    "parameters",
    "search",
    "shape_of",
    "sliced",
    "summarize",
]
