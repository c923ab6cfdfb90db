"""Checks that outsiders can import: `check_balancer`, and `python -m himoe.testing.golden` for golden numbers."""

from himoe.testing.conformance import check_balancer

__all__ = ["check_balancer"]
