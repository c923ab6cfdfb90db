"""What a model costs before it is built: parameters, FLOPs, memory, and the use of its experts. Imports no torch."""

from himoe.plan.count import Flops, Parameters, flops, parameters
from himoe.plan.models import model_names, named_shape
from himoe.plan.of_config import shape_of
from himoe.plan.shape import Shape

__all__ = ["Flops", "Parameters", "Shape", "flops", "model_names", "named_shape", "parameters", "shape_of"]
