"""The lines that a run writes about itself: metrics.jsonl, load.jsonl, and the numbers of summary.json."""

from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from himoe.run_folder import read_log
from himoe.train.alarms import Alarm
from himoe.train.environment import peak_memory_mib
from himoe.train.loop import Trainer
from himoe.train.writers import JsonLines, Writer


class Journal:
    """Writes the lines of a run, and remembers the last ones, those of earlier processes too.

    Args:
        folder: the run folder.
        trainer: whose lines these are.
        seconds_before: training time of earlier processes of this run.
        writers: where lines go beside the run folder.
    """

    def __init__(
        self, folder: Path, trainer: Trainer, *, seconds_before: float = 0.0, writers: Writer | None = None
    ) -> None:
        self._trainer, self._started = trainer, perf_counter() - seconds_before
        self._writers: list[Writer] = [JsonLines(folder)] + ([writers] if writers else [])
        self._mark = self._times()
        evaluations = [line for line in read_log(folder / "metrics.jsonl") if line.get("kind") == "eval"]
        loads = [line for line in read_log(folder / "load.jsonl") if "layers" in line]
        self._evaluation: dict[str, Any] = evaluations[-1] if evaluations else {}
        self._layers: list[dict[str, Any]] = loads[-1]["layers"] if loads else []
        self.alarms: list[Alarm] = []
        """Those that went off at the last training line."""

    @property
    def seconds(self) -> float:
        """Seconds since training began: steps, evaluations and checkpoints of every process, not the time between."""
        return perf_counter() - self._started

    def training_line(self) -> dict[str, Any]:
        """Write the lines of the interval that ends now, and the alarms they set off; begin the next interval."""
        trainer, mark = self._trainer, self._mark
        self._mark = self._times()
        tokens, seconds, waited = (now - before for now, before in zip(self._mark, mark, strict=True))
        means, layers = trainer.means.read(), trainer.statistics.read()
        line = {
            "kind": "train",
            **self._position(),
            "loss": means["loss"],
            "aux": {name.removeprefix("aux/"): value for name, value in means.items() if name.startswith("aux/")},
            "lr": trainer.learning_rate(trainer.steps_done),
            "grad_norm": means["grad_norm"],
            "norms": trainer.monitor.norms.read(),
            "noise_scale": trainer.monitor.noise.read(),
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "data_wait": min(1.0, waited / max(seconds, 1e-9)),
            "max_vio": max((layer["max_vio_window"] for layer in layers), default=None),
        }
        self._write(line)
        if layers:
            self._write({"step": trainer.steps_done, "layers": layers})
            self._layers = layers
        self.alarms = trainer.monitor.alarms.check(line, layers, waited=waited)
        for alarm in self.alarms:
            self.alarm_line(alarm)
        trainer.means.reset()
        trainer.statistics.start_interval()
        return line

    def alarm_line(self, alarm: Alarm) -> None:
        """Write an alarm: what `Alarms.check` found, or the one of a `DivergedError`."""
        self._write({"kind": "alarm", **self._position(), "step": alarm.step, **alarm.line()})

    def evaluation_line(self, result: Mapping[str, Any]) -> None:
        """Write an evaluation: the dictionary that `evaluate_domains` returns."""
        self._evaluation = dict(result)
        self._write({"kind": "eval", **self._position(), **result})

    def summary(self, status: str) -> dict[str, Any]:
        """Return the run as the last lines tell it; None stands for what has not been measured yet."""
        trainer, layers = self._trainer, self._layers
        return {
            "status": status,
            **self._position(),
            "tokens_per_second": trainer.tokens_done / trainer.step_seconds if trainer.step_seconds else None,
            "loss": self._evaluation.get("loss"),
            "bits_per_byte": self._evaluation.get("bits_per_byte"),
            "domains": self._evaluation.get("domains", {}),
            "layers": [{key: value for key, value in layer.items() if key != "load"} for layer in layers],
            "max_vio_window": max((layer["max_vio_window"] for layer in layers), default=None),
            "cv_window": max((layer["cv_window"] for layer in layers), default=None),
            "peak_memory_mib": peak_memory_mib(),
        }

    def _position(self) -> dict[str, Any]:
        return {
            "step": self._trainer.steps_done,
            "tokens": self._trainer.tokens_done,
            "seconds": round(self.seconds, 3),
        }

    def _times(self) -> tuple[int, float, float]:
        return self._trainer.tokens_done, self._trainer.step_seconds, self._trainer.data_seconds

    def _write(self, line: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.log(line)

    def close(self) -> None:
        """Close the files and the other writers."""
        for writer in self._writers:
            writer.close()


def describe_evaluation(result: dict[str, Any]) -> str:
    """Return an evaluation as one line of text."""
    domains = ", ".join(f"{name} {_bits(record)}" for name, record in result["domains"].items())
    return f"held-out bits per byte {_bits(result)} ({domains})"


def _bits(record: Mapping[str, Any]) -> str:
    bits = record["bits_per_byte"]
    return "–" if bits is None else f"{bits:.3f}"
