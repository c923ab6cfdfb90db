"""Sweeps: many runs of one question, on one machine or many, as ordinary run folders and one table made from them.

`run_sweep(spec, out)` does the runs, `expand(spec)` says which they are; `himoe.sweep.comparison` is a sweep of
strategies that says which is better. Nothing here imports PyTorch before runs are checked.
"""

from himoe.sweep.driver import SweepResult, run_sweep
from himoe.sweep.engines import EngineOptions
from himoe.sweep.expand import Run, expand
from himoe.sweep.query import query
from himoe.sweep.spec import Spec, load_spec, shipped_names
from himoe.sweep.table import Table, build_table

__all__ = [
    "EngineOptions",
    "Run",
    "Spec",
    "SweepResult",
    "Table",
    "build_table",
    "expand",
    "load_spec",
    "query",
    "run_sweep",
    "shipped_names",
]
