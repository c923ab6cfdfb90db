"""`himoe plan`: what a model costs, before anything is built."""

import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import Positional, UseAppendAction

from himoe.cli.parsing import Verb, option
from himoe.cli.plan_tables import print_comparison, print_plan, print_search
from himoe.config import Config, load_config
from himoe.config.loading import parse_sets
from himoe.errors import ConfigError
from himoe.plan import Shape, model_names, named_shape, shape_of
from himoe.plan.memory import Ranks
from himoe.plan.models import training_of
from himoe.plan.search import as_document, parse_budget, search
from himoe.plan.slicing import sliced
from himoe.plan.summary import summarize
from himoe.run_folder import run_of


@dataclass(kw_only=True)
class Plan(Verb):
    """Say what a model costs: parameters, FLOPs, memory, use of experts.

    Published models:
      mixtral_8x7b, olmoe_1b_7b, qwen3_30b_a3b, qwen3_235b, deepseek_v3,
      gpt_oss_120b, himoe_paper_nanogpt, himoe_paper_7b, and the dense scales of
      Slicing and Dicing, sd_10m sd_20m sd_50m sd_80m sd_110m sd_200m sd_300m

    Examples:
      himoe plan lm_small
          a recipe, a TOML file, or the config.json of a run
      himoe plan olmoe_7b --dp 64 --ep 8 --shard
          memory of one of 64 ranks, 8 of which share the experts
      himoe plan --model deepseek_v3 --set train.seq_len=8192
          a published model, trained as olmoe_7b is but for one value
      himoe plan --model sd_50m --sparsity 256 --granularity 1/4
          1024 experts, 4 for each token, as large as the dense layer
      himoe plan --compare lm_small lm_small_dense
          two side by side
      himoe plan lm_small --budget active=50M,memory=24GB
          the best shapes within limits (also total= and compute=)
    """

    recipe: Annotated[Positional[str | None], option("[RECIPE | FILE.toml]")] = None
    """A recipe's name (see `himoe list recipes`), a TOML file, or the config.json of a run. Without it: lm_demo.
    Beside --model: how that is trained."""
    model: Annotated[str | None, option("NAME")] = None
    """A published model in place of the configuration's."""
    changes: Annotated[UseAppendAction[tuple[str, ...]], option("KEY=VALUE", "set")] = ()
    """Change one value of the configuration; may be given often. Of a published model, only what begins with train."""
    sparsity: Annotated[str | None, option("S")] = None
    """Of a published model: s = E/K, experts over those of a token. Without it: its own."""
    granularity: Annotated[str | None, option("G")] = None
    """Of a published model: g = F/(4·D), such as 1/8; K·F stays. Without it: its own."""
    dp: Annotated[int, option("N")] = 1
    """Ranks that each read a share of the batch. Without it: 1."""
    ep: Annotated[int, option("N")] = 1
    """How many of them share the experts of a layer. Without it: 1, every rank has all."""
    shard: Annotated[bool, option()] = False
    """Split weights, gradients and optimizer state over all ranks (FSDP)."""
    compare: Annotated[tuple[str, str] | None, option("A B")] = None
    """Two recipes, files or published models, side by side."""
    budget: Annotated[str | None, option("LIMITS")] = None
    """Search shapes within limits, as in active=50M,memory=24GB: parameters active and total, memory of a rank,
    compute in FLOPs, with 20 tokens for each active parameter. The recipe gives what is not searched."""

    def run(self, command: list[str]) -> int:  # noqa: ARG002
        """Print a plan, a comparison or a search."""
        if self.compare and (self.recipe or self.model or self.budget):
            raise ConfigError("--compare names both models itself; leave the recipe, --model and --budget out")
        if self.budget and self.model:
            raise ConfigError("--budget searches around a recipe or a file; leave --model out")
        if (self.sparsity or self.granularity) and not self.model:
            raise ConfigError(
                "--sparsity and --granularity are for --model; in a configuration set moe.num_experts, moe.top_k and "
                "moe.expert_dim"
            )
        console = Console()
        if self.compare:
            first, second = map(self._named, self.compare)
            found: dict[str, Any] = {"first": first, "second": second}
            self._show(found, lambda: print_comparison(console, first, second))
        elif self.budget:
            limits, config = parse_budget(self.budget), _with_vocabulary(load_config(self.recipe, sets=self.changes))
            found = as_document(search(config, limits, self._ranks()), limits, config)
            self._show(found, lambda: print_search(console, found))
        else:
            found = self._published(self.model) if self.model else self._configured(self.recipe)
            self._show(found, lambda: print_plan(console, found))
        return 0

    def _show(self, found: dict[str, Any], printed: Any) -> None:
        print(json.dumps(found)) if self.as_json else printed()

    def _ranks(self) -> Ranks:
        return Ranks(self.dp, self.ep, self.shard)

    def _named(self, name: str) -> dict[str, Any]:
        return self._published(name) if name in model_names() else self._configured(name)

    def _configured(self, source: str | None) -> dict[str, Any]:
        config = load_config(source, sets=self.changes)
        shape = shape_of(config, _vocab_size(config, source))
        return summarize(shape, config.train, config=config, ranks=self._ranks())

    def _published(self, name: str) -> dict[str, Any]:
        shape: Shape = named_shape(name)
        if other := [section for section in parse_sets(self.changes) if section != "train"]:
            raise ConfigError(
                f"--set {other[0]}: a published model has sizes of its own; change train only, or give --sparsity and "
                "--granularity"
            )
        if self.sparsity or self.granularity:
            shape = sliced(
                shape,
                sparsity=_ratio("--sparsity", self.sparsity),
                granularity=_ratio("--granularity", self.granularity),
            )
        train = load_config(self.recipe or training_of(name), sets=self.changes).train
        return summarize(shape, train, ranks=self._ranks())


def _ratio(name: str, text: str | None) -> Fraction | None:
    """Return the ratio that a text such as 1/8 is."""
    try:
        value = None if text is None else Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if value is not None and value <= 0:
        raise ConfigError(f"{name} is {text!r}; it must be a number above 0, such as 4 or 1/8")
    return value


def _with_vocabulary(config: Config) -> Config:
    """Return the configuration with the number of tokens in the place of a tokenizer that is there already."""
    found = _vocab_size(config, None)
    if found is None:
        return config
    data = config.data.model_copy(update={"tokenizer": "bpe", "vocab_size": found})
    return config.model_copy(update={"data": data})


def _vocab_size(config: Config, source: str | None) -> int | None:
    """Return V of a tokenizer that is there already, None where the configuration says it."""
    run = Path(source).parent if source and Path(source).suffix == ".json" else None
    if run is None and config.train.init_from and config.data.tokenizer == "bpe":
        run = run_of(Path(config.train.init_from))
    place = Path(config.data.tokenizer)
    if config.data.tokenizer in ("bpe", "byte"):
        folder = run or (Path(config.data.path) if config.data.path else None)
        if folder is None or not (folder / "tokenizer.json").is_file():
            return None
        place = folder / "tokenizer.json"
    from himoe.data.tokenizer import load_tokenizer

    return load_tokenizer(place).vocab_size
