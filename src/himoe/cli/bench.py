"""`himoe bench`: how fast, against whom, and why. Four verbs of its own: layer, train, model, doctor."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, UseAppendAction

from himoe.cli.bench_layer import BenchLayer
from himoe.cli.bench_options import MeasuringVerb, known_words
from himoe.cli.bench_tables import print_diagnosis, print_model, print_step
from himoe.cli.parsing import Verb, option
from himoe.errors import ConfigError


@dataclass(kw_only=True)
class BenchTrain(MeasuringVerb):
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
        device = self.prepare()
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
class BenchModel(MeasuringVerb):
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
        known_words("--peer", (self.peer,), ("grouped_mm", "eager"))
        steps = self.steps if self.steps is not None else (5 if self.quick else 20)
        if steps < 1 or self.tokens < 2:
            raise ConfigError(f"--steps is {steps} and --tokens {self.tokens}; they must be at least 1 and 2")
        device, console = self.prepare(), Console(stderr=self.as_json)
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
