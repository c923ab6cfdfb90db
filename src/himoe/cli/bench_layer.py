"""`himoe bench layer`: the expert layer against its peers."""

import json
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import UseAppendAction

from himoe.bench.shapes import cases, parse_shape, plan
from himoe.cli.bench_options import MeasuringVerb, known_words
from himoe.cli.bench_tables import print_layer, print_parts
from himoe.cli.folders import existing_run
from himoe.cli.parsing import option
from himoe.errors import ConfigError

WRONG = 1
"""Exit status when somebody computed something wrong."""
QUICK_CASE_SECONDS, CASE_SECONDS, GPU_CASE_SECONDS = 4.0, 20.0, 5.0
QUICK_TOTAL_SECONDS = 100.0
"""With --quick, no shape is begun later."""


@dataclass(kw_only=True)
class BenchLayer(MeasuringVerb):
    """Time the expert layer, forward and backward, against its peers.

    Who gives a wrong output or gradient is reported and not timed.

    Exit status:
      0   everybody measured was right
      1   somebody was not: see "wrong" in the output

    Examples:
      himoe bench layer --quick --threads 2
          about two minutes
      himoe bench layer --threads 2 --json > layer.json
          every shape, routing and dtype, about a quarter of an hour
      himoe bench layer --shape e64 --shape 2048,512,256,64,8 --routing zipf
          one named shape and one of your own: T,D,F,E,K
      himoe bench layer --run runs/novels --plot layer.html
          also the routing of a trained model, and a page with charts
      himoe bench layer --parts --shape e128-f128
          what router, dispatch, combine and statistics take of the layer
    """

    shape: Annotated[UseAppendAction[tuple[str, ...]], option("NAME|T,D,F,E,K")] = ()
    """A shape; may be given often. Without it: all that fit the device, fewer with --quick."""
    dtype: Annotated[UseAppendAction[tuple[str, ...]], option("fp32|bf16")] = ()
    """A dtype; may be given twice. Without it: each shape's own, fp32 on a CPU for one of your own, else bf16."""
    routing: Annotated[UseAppendAction[tuple[str, ...]], option("NAME")] = ()
    """uniform, zipf, one_hot, or real (with --run); may be given often. Without it: each shape's own; of T,D,F,E,K,
    uniform."""
    peer: Annotated[UseAppendAction[tuple[str, ...]], option("NAME")] = ()
    """dense, hf_grouped, hf_eager, st_moe, liger, scattermoe or sonicmoe; may be given often. Without it: all."""
    backend: Annotated[str, option("NAME")] = "auto"
    """Which of our backends a row's ratios are of; the others are measured too. Without it: the one the layer takes."""
    run_folder: Annotated[Path | None, option("RUN", "run")] = None
    """A trained run, whose layer and real routing are measured too."""
    seconds: Annotated[float | None, option("S")] = None
    """Seconds of timing for each row. Without it: 20, on a GPU 5, with --quick 4."""
    quick: Annotated[bool, option()] = False
    """Few shapes, about two minutes; peers that take longer than 4 seconds for a step are left out."""
    parts: Annotated[bool, option()] = False
    """Measure what surrounds the experts instead, each part alone."""
    plot: Annotated[Path | None, option("FILE")] = None
    """Write a page with charts (needs plotly: pip install 'himoe[report]')."""
    seed: Annotated[int, option("N")] = 0
    """Decides all numbers and routings. Without it: 0."""

    def run(self, command: list[str]) -> int:  # noqa: ARG002
        """Measure, print tables, and return 0 or 1."""
        self._check()
        device = self.prepare()
        console = Console(stderr=self.as_json)
        from himoe.bench.machine import environment

        found = environment(device)
        if self.parts:
            result = {"parts": self._parts(device, console), "environment": found}
            print(json.dumps(result)) if self.as_json else print_parts(console, result)
            return 0
        result = self._layer(device, console, found)
        if self.plot:
            from himoe.bench.plot import write_plot

            write_plot(result, self.plot)
            Console(stderr=True).print(f"wrote {self.plot}", highlight=False, markup=False, soft_wrap=True)
        print(json.dumps(result)) if self.as_json else print_layer(console, result)
        return WRONG if any(row["failed"] for row in result["rows"]) else 0

    def _check(self) -> None:
        """Refuse what cannot be, before torch is imported."""
        known_words("--dtype", self.dtype, ("fp32", "bf16"))
        known_words("--routing", self.routing, ("uniform", "zipf", "one_hot", "real"))
        for name in self.shape:
            parse_shape(name)
        if self.seconds is not None and not self.seconds > 0:
            raise ConfigError(f"--seconds is {self.seconds}; it must be above 0")
        if "real" in self.routing and self.run_folder is None:
            raise ConfigError("--routing real needs a trained run: add --run RUN")
        if self.plot is not None and not self.plot.parent.is_dir():
            raise ConfigError(f"--plot {self.plot}: there is no folder {self.plot.parent}")

    def _cases(self, device: str, console: Console, bf16_is_slow: bool) -> list[tuple[Any, ...]]:
        """Return (shape, dtype, routing, choice) of every row."""
        measured = plan(device, quick=self.quick, names=self.shape)
        routings = [name for name in self.routing if name != "real"]
        only_real = bool(self.routing) and not routings
        found = [] if only_real else [(*case, None) for case in cases(measured, self.dtype, routings)]
        if self.quick and bf16_is_slow and not self.dtype:
            found = [case for case in found if case[1] != "bf16"]
        if self.run_folder is not None:
            from himoe.bench.real import real_routing

            real = real_routing(existing_run(self.run_folder), console)
            found += [(real.shape, dtype, "real", real.choice) for dtype in self.dtype or ("fp32",)]
        return found

    def _layer(self, device: str, console: Console, environment: dict[str, Any]) -> dict[str, Any]:
        from himoe.bench import ratios
        from himoe.bench.layer import Settings, measure
        from himoe.bench.peers import PEERS
        from himoe.kernels import backend_status

        status = backend_status()
        known_words("--peer", self.peer, PEERS)
        known_words("--backend", (self.backend,), ("auto", *status))
        settings = Settings(
            backends=[name for name, reason in status.items() if reason is None],
            peers=list(self.peer or PEERS),
            seconds=self._seconds(device),
            device=device,
            backend=self.backend,
            quick=self.quick,
            seed=self.seed,
        )
        rates = environment["matmul_gflops"]
        slow = rates["bf16"] < rates["fp32"] / 2
        wanted, rows, started = self._cases(device, console, slow), [], time.monotonic()
        together = [
            (*key, {routing: choice for _, _, routing, choice in some})
            for key, some in groupby(wanted, key=lambda case: case[:2])
        ]
        measured = 0
        with console.status("") as line:
            for shape, dtype, routings in together:
                if self.quick and rows and time.monotonic() - started > QUICK_TOTAL_SECONDS:
                    break

                measured += 1
                where = f"{measured} of {len(together)}: {shape.name} {dtype} {', '.join(routings)}"
                if not console.is_terminal:
                    Console(stderr=True).print(where, highlight=False, markup=False)

                def say(what: str, where: str = where) -> None:
                    line.update(f"{where} · {what}")

                found = measure(shape, dtype, routings, settings, say=say)
                for row in found:
                    for one in row["times"].values():
                        one["of_product"] = one["gflops"] / rates[dtype]
                rows += found
        return {
            "rows": rows,
            "summary": ratios.summarize(rows),
            "skew": ratios.skew(rows),
            "left_out": [
                f"{shape.name} {dtype} {routing}" for shape, dtype, some in together[measured:] for routing in some
            ],
            "bf16_left_out": slow and self.quick and not self.dtype,
            "unavailable": {
                **{name: reason for name, reason in status.items() if reason},
                **{name: reason for name in settings.peers if (reason := PEERS[name].missing(device))},
            },
            "settings": {"seconds": settings.seconds, "seed": self.seed, "quick": self.quick, "backend": self.backend},
            "environment": environment,
        }

    def _seconds(self, device: str) -> float:
        usual = GPU_CASE_SECONDS if device == "cuda" else CASE_SECONDS
        return self.seconds or (QUICK_CASE_SECONDS if self.quick else usual)

    def _parts(self, device: str, console: Console) -> list[dict[str, Any]]:
        from himoe.bench.parts import measure_parts

        shapes = [parse_shape(name) for name in self.shape or ("e128-f128", "4096,256,256,64,8")]
        seconds = self._seconds(device)
        with console.status("timing the parts"):
            return [
                measure_parts(shape, dtype, seconds=seconds, device=device, seed=self.seed)
                for shape in shapes
                for dtype in self.dtype or ("fp32",)
            ]
