"""`himoe bench`: how fast, against whom, and why. Four verbs of its own: layer, train, model, doctor."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import Positional, UseAppendAction

from himoe.bench.shapes import cases, parse_shape, plan
from himoe.cli.bench_tables import print_diagnosis, print_layer, print_model, print_parts, print_step
from himoe.cli.folders import existing_run
from himoe.cli.parsing import Verb, option
from himoe.errors import ConfigError, nearest

WRONG = 1
"""Exit status when somebody computed something wrong."""
QUICK_CASE_SECONDS, CASE_SECONDS = 4.0, 20.0
QUICK_TOTAL_SECONDS = 100.0
"""With --quick, no row is begun later."""


@dataclass(kw_only=True)
class _Bench(Verb):
    """What the verbs that measure share."""

    threads: Annotated[int | None, option("N")] = None
    """Threads that products may use. Without it: what torch takes, one for every core."""
    device: Annotated[str | None, option("cpu|cuda")] = None
    """Where to measure. Without it: the GPU where there is one."""

    def _prepare(self) -> str:
        """Set the threads and return the device; imports torch."""
        if self.device not in (None, "cpu", "cuda"):
            raise ConfigError(f"--device is {self.device!r}; it must be cpu or cuda")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"--threads is {self.threads}; it must be at least 1")
        import torch

        if self.threads:
            torch.set_num_threads(self.threads)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch sees no GPU here")
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(kw_only=True)
class BenchLayer(_Bench):
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
    """Seconds of timing for each row. Without it: 20, with --quick 4."""
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
        device = self._prepare()
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
        _known("--dtype", self.dtype, ("fp32", "bf16"))
        _known("--routing", self.routing, ("uniform", "zipf", "one_hot", "real"))
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
        _known("--peer", self.peer, PEERS)
        _known("--backend", (self.backend,), ("auto", *status))
        settings = Settings(
            backends=[name for name, reason in status.items() if reason is None],
            peers=list(self.peer or PEERS),
            seconds=self.seconds or (QUICK_CASE_SECONDS if self.quick else CASE_SECONDS),
            device=device,
            backend=self.backend,
            quick=self.quick,
            seed=self.seed,
        )
        rates = environment["matmul_gflops"]
        slow = rates["bf16"] < rates["fp32"] / 2
        wanted, rows, started = self._cases(device, console, slow), [], time.monotonic()
        with console.status("") as line:
            for number, (shape, dtype, routing, choice) in enumerate(wanted, 1):
                if self.quick and rows and time.monotonic() - started > QUICK_TOTAL_SECONDS:
                    break

                where = f"{number} of {len(wanted)}: {shape.name} {dtype} {routing}"
                if not console.is_terminal:
                    Console(stderr=True).print(where, highlight=False, markup=False)

                def say(what: str, where: str = where) -> None:
                    line.update(f"{where} · {what}")

                rows.append(measure(shape, dtype, routing, settings, choice=choice, say=say))
                for one in rows[-1]["times"].values():
                    one["of_product"] = one["gflops"] / rates[dtype]
        return {
            "rows": rows,
            "summary": ratios.summarize(rows),
            "skew": ratios.skew(rows),
            "left_out": [f"{shape.name} {dtype} {routing}" for shape, dtype, routing, _ in wanted[len(rows) :]],
            "bf16_left_out": slow and self.quick and not self.dtype,
            "unavailable": {
                **{name: reason for name, reason in status.items() if reason},
                **{name: reason for name in settings.peers if (reason := PEERS[name].missing(device))},
            },
            "settings": {"seconds": settings.seconds, "seed": self.seed, "quick": self.quick, "backend": self.backend},
            "environment": environment,
        }

    def _parts(self, device: str, console: Console) -> list[dict[str, Any]]:
        from himoe.bench.parts import measure_parts

        shapes = [parse_shape(name) for name in self.shape or ("e128-f128", "4096,256,256,64,8")]
        seconds = self.seconds or (QUICK_CASE_SECONDS if self.quick else CASE_SECONDS)
        with console.status("timing the parts"):
            return [
                measure_parts(shape, dtype, seconds=seconds, device=device, seed=self.seed)
                for shape in shapes
                for dtype in self.dtype or ("fp32",)
            ]


@dataclass(kw_only=True)
class BenchTrain(_Bench):
    """Break a training step down: attention, router, experts, loss and so on.

    Trains a few steps with a clock in them and as many without; writes nothing.

    Examples:
      himoe bench train
          the default recipe on text this machine already has
      himoe bench train lm_small --steps 20 --threads 2
          another recipe
      himoe bench train my.toml --set moe.preset=switch --json
          your own, with one value changed, as JSON
    """

    recipe: Annotated[Positional[str | None], option("[RECIPE | FILE.toml]")] = None
    """A recipe's name, a TOML file, or the config.json of a run. Without it: lm_demo."""
    changes: Annotated[UseAppendAction[tuple[str, ...]], option("KEY=VALUE", "set")] = ()
    """Change one value of the configuration; may be given often."""
    data: Annotated[Path | None, option("PATH")] = None
    """What to read: any text that `himoe prepare` reads. Without it: what the recipe says."""
    steps: Annotated[int | None, option("N")] = None
    """Steps with and steps without the clock. Without it: 20, with --quick 5."""
    quick: Annotated[bool, option()] = False
    """Few steps."""

    def run(self, command: list[str]) -> int:  # noqa: ARG002
        """Measure and print the table."""
        steps = self.steps if self.steps is not None else (5 if self.quick else 20)
        if steps < 1:
            raise ConfigError(f"--steps is {steps}; it must be at least 1")
        if self.device is not None:
            raise ConfigError("--device: a recipe trains on the GPU where there is one; leave it out")
        from himoe.config import load_config

        overrides = {"data": {"path": str(self.data), "sources": None}} if self.data else {}
        config = load_config(self.recipe, sets=self.changes, overrides=overrides)
        console = Console(stderr=self.as_json)
        device = self._prepare()
        from himoe.bench.machine import environment
        from himoe.bench.step import measure_step, trainer_of
        from himoe.trained import load_corpus, set_threads

        if not self.threads:
            set_threads(config)
        trainer = trainer_of(config, load_corpus(config, console))
        with console.status("training") as line:
            done = iter(range(1, 2 * steps + 1))
            found = measure_step(trainer, steps=steps, on_step=lambda: line.update(f"step {next(done)} of {2 * steps}"))
        result = {"recipe": config.name, **found, "environment": environment(device)}
        print(json.dumps(result)) if self.as_json else print_step(console, result)
        return 0


@dataclass(kw_only=True)
class BenchModel(_Bench):
    """Time whole training steps: our model, and with transformers' experts.

    Same weights and tokens; beside the ratio stands what Amdahl's law allows.

    Examples:
      himoe bench model --threads 2
          6 layers of width 256, 64 experts of 128, 8 per token, 1,024 tokens
      himoe bench model --layers 2 --experts 32 --hidden-dim 256 --quick
          other sizes, few steps
    """

    layers: Annotated[int, option("L")] = 6
    """Layers. Without it: 6."""
    dim: Annotated[int, option("D")] = 256
    """Width. Without it: 256."""
    experts: Annotated[int, option("E")] = 64
    """Experts of a layer, in 4 groups. Without it: 64."""
    top_k: Annotated[int, option("K")] = 8
    """Experts of a token, a multiple of 4. Without it: 8."""
    hidden_dim: Annotated[int, option("F")] = 128
    """Hidden width of an expert. Without it: 128."""
    tokens: Annotated[int, option("T")] = 1024
    """Tokens of a step, two rows of half as many. Without it: 1024."""
    peer: Annotated[str, option("grouped_mm|eager")] = "grouped_mm"
    """Which experts of transformers. Without it: grouped_mm."""
    steps: Annotated[int | None, option("N")] = None
    """Steps of each. Without it: 20, with --quick 5."""
    quick: Annotated[bool, option()] = False
    """Few steps."""

    def run(self, command: list[str]) -> int:  # noqa: ARG002
        """Measure and print the table."""
        _known("--peer", (self.peer,), ("grouped_mm", "eager"))
        steps = self.steps if self.steps is not None else (5 if self.quick else 20)
        if steps < 1 or self.tokens < 2:
            raise ConfigError(f"--steps is {steps} and --tokens {self.tokens}; they must be at least 1 and 2")
        device, console = self._prepare(), Console(stderr=self.as_json)
        from himoe.bench.machine import environment
        from himoe.bench.model import measure_model, model_config

        config = model_config(
            layers=self.layers,
            dim=self.dim,
            experts=self.experts,
            top_k=self.top_k,
            hidden_dim=self.hidden_dim,
            tokens=self.tokens,
        )
        with console.status("building") as line:
            found = measure_model(config, steps=steps, device=device, peer=self.peer, say=line.update)
        result = {**found, "environment": environment(device)}
        print(json.dumps(result)) if self.as_json else print_model(console, result)
        return 0


@dataclass(kw_only=True)
class BenchDoctor(Verb):
    """Say which expert kernel runs on this machine, and what else it has.

    Examples:
      himoe bench doctor
          backends, choices, threads, libraries, compiler, versions
      himoe bench doctor --json
          the same for a program
    """

    def run(self, command: list[str]) -> int:  # noqa: ARG002
        """Print what was found."""
        from himoe.bench.machine import diagnosis

        found = diagnosis()
        print(json.dumps(found)) if self.as_json else print_diagnosis(Console(), found)
        return 0


@dataclass(kw_only=True)
class Bench(Verb):
    """Measure speed against others, and see where a step's time goes.

    Verbs:
      layer    the expert layer against its peers, right before fast
      train    a training step of a recipe by its parts
      model    a whole step against the same model with transformers' experts
      doctor   which backend runs here and why

    Examples:
      himoe bench layer --quick --threads 2
      himoe bench train lm_small
      himoe bench model --quick
      himoe bench doctor

    `himoe bench VERB --help` explains one, docs/benchmarks.md every number.
    """

    def run(self, command: list[str]) -> int:  # noqa: ARG002
        """Name the verbs."""
        raise ConfigError(f"name one of {', '.join(BENCH_VERBS)}, such as: himoe bench layer --quick")


BENCH_VERBS: dict[str, type[Verb]] = {
    "layer": BenchLayer,
    "train": BenchTrain,
    "model": BenchModel,
    "doctor": BenchDoctor,
}


def _known(name: str, given: Sequence[str], known: Sequence[str] | dict[str, Any]) -> None:
    for word in given:
        if word not in known:
            raise ConfigError(f"{name} is {word!r}; known: {', '.join(known)}{nearest(word, list(known))}")
