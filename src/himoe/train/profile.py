"""A trace of a few training steps: what the machine does, operation by operation, and which take the time."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIP_STEPS = 4
"""Steps before the recording: the first are slower, they allocate and compile."""
RECORDED_STEPS = 3
TOP = 15


class Profile:
    """Records some steps, once, and writes `trace.json.gz` and `operators.txt`; training comes out the same.

    A run that ends before all of them are done leaves nothing.

    The trace opens in https://ui.perfetto.dev or chrome://tracing.

    Args:
        folder: where the files go; made when they are written.
        skip: steps that are not recorded; one more only warms the profiler up.
        steps: steps that are recorded.

    ```python
    with Profile(Path("runs/first/profile")) as recording:
        for _ in range(100):
            trainer.step()
            if table := recording.on_step():
                print(table)
    ```
    """

    def __init__(self, folder: Path, *, skip: int = SKIP_STEPS, steps: int = RECORDED_STEPS) -> None:
        self.folder, self._steps = folder, steps
        self.needs = skip + 1 + steps
        """Steps until the recording is complete."""
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=skip, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._table: str | None = None

    @property
    def complete(self) -> bool:
        """Whether all steps have been recorded."""
        return self._profiler.step_num >= self.needs

    def __enter__(self) -> Self:
        self._profiler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profiler.stop()

    def on_step(self) -> str | None:
        """Count a step that is done; return the table of operators once, after the last recorded one."""
        self._profiler.step()
        table, self._table = self._table, None
        return table

    def _write(self, profiler: profile) -> None:
        if not self.complete:  # stopped on the way: what came after the last step would count as one
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
        self._table = _table(profiler.key_averages(), self._steps)
        (self.folder / "operators.txt").write_text(self._table + "\n", encoding="utf-8")


def _table(operators: Any, steps: int) -> str:
    """Return the operators that take most time themselves, without those that they call."""
    on_device = torch.cuda.is_available()
    times = {
        operator.key: (operator.self_device_time_total if on_device else operator.self_cpu_time_total, operator.count)
        for operator in operators
        if not operator.key.startswith("ProfilerStep")
    }
    total = sum(time for time, _ in times.values()) or 1.0
    rows = sorted(times.items(), key=lambda row: row[1][0], reverse=True)[:TOP]
    lines = [f"{'operator':<48} {'share':>6} {'ms/step':>9} {'calls/step':>10}"]
    for name, (microseconds, calls) in rows:
        lines.append(
            f"{name[:48]:<48} {microseconds / total:>6.1%} {microseconds / 1000 / steps:>9.2f} {calls / steps:>10.1f}"
        )
    return "\n".join(lines)
