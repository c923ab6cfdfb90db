"""Benchmarks: the expert layer against its peers, a training step by its parts, two models, and what runs here.

Nothing is timed before it is known to compute the right thing, and nothing here is called by tests for its speed.
"""
