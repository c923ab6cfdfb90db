"""The training room: optimizer, schedule, one step, evaluation, checkpoints, statistics.

Everything here takes plain keyword arguments; only `himoe.run` and `himoe.trained` read the configuration. The way of
one step is `loop.py`, what happens between steps is `fit.py`.
"""
