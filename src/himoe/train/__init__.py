"""The training room: optimizer, schedule, one step, evaluation, checkpoints, statistics, the run folder's writers.

Everything here takes plain keyword arguments; only `himoe.run` reads the configuration. The way of one step is
`loop.py`, what happens between steps is `fit.py`.
"""
