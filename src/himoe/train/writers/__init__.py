"""Where the lines of a run go: `metrics.jsonl` and `load.jsonl` always, and the tools that `train.log_to` names.

A writer has two methods. Every tool is one file here and one line in `WRITERS`; none is imported before it is asked
for, and none touches the network unless the user has told the tool to.
"""

from himoe.train.writers.base import RunIdentity, Writer, flatten
from himoe.train.writers.json_lines import JsonLines
from himoe.train.writers.opening import WRITERS, Guarded, check_writers, open_writers

__all__ = ["WRITERS", "Guarded", "JsonLines", "RunIdentity", "Writer", "check_writers", "flatten", "open_writers"]
