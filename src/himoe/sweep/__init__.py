"""Sweeps: many runs of one question, on one machine or many, as ordinary run folders and one table made from them.

`run_sweep(spec, out)` does the runs, `expand(spec)` says which they are; `compare_strategies` does one of routers
and says which is better. Nothing here imports PyTorch before runs are checked.
"""

from himoe.sweep.comparison import Compared, compare_strategies
from himoe.sweep.driver import SweepResult, run_sweep
from himoe.sweep.engines import EngineOptions
from himoe.sweep.expand import Run, expand
from himoe.sweep.query import query
from himoe.sweep.spec import Spec, load_spec, shipped_names
from himoe.sweep.strategies import strategies
from himoe.sweep.table import Table, build_table

__all__ = [
    "Compared",
    "EngineOptions",
    "Run",
    "Spec",
    "SweepResult",
    "Table",
    "build_table",
    "compare_strategies",
    "expand",
    "load_spec",
    "query",
    "run_sweep",
    "shipped_names",
    "strategies",
]
