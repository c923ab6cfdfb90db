"""Checks that outsiders can import: `check_balancer`, `check_experts`.

And `python -m himoe.testing.golden` for golden numbers.
"""

from himoe.testing.conformance import check_balancer
from himoe.testing.experts import check_experts

__all__ = ["check_balancer", "check_experts"]
