"""Checks that outsiders can import: `check_balancer` and its like; `python -m himoe.testing.golden` checks numbers."""

from himoe.testing.causality import check_causality, suffix_test
from himoe.testing.conformance import check_balancer
from himoe.testing.experts import check_experts
from himoe.testing.gates import check_gate
from himoe.testing.selectors import check_selector

__all__ = ["check_balancer", "check_causality", "check_experts", "check_gate", "check_selector", "suffix_test"]
