"""From text to shards: `prepare.py` first, then `scan.py`, `split.py`, `choice.py`, `writing.py`, and how it is run.

That is `pool.py`, `worker.py` and `progress.py`; `bench.py` measures it. `himoe.data` exports `prepare`.
"""
