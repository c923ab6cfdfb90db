"""The expert MLP, one function with interchangeable backends; each is tested against `functional/reference.py`."""

from himoe.kernels.caching_allocator import empty_cache, memory_allocated, memory_reserved
from himoe.kernels.expert_mlp import BACKENDS, backend_status, choose_backend, expert_mlp, sort_pairs

__all__ = [
    "BACKENDS",
    "backend_status",
    "choose_backend",
    "empty_cache",
    "expert_mlp",
    "memory_allocated",
    "memory_reserved",
    "sort_pairs",
]
