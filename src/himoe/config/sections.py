"""The sections of a configuration: every key, its unit and its default stand here once.

`docs/configuration.md` is written from these descriptions.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from himoe.config.rules import fill_in
from himoe.errors import ConfigError, nearest
from himoe.registry import TABLES, check_name

STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def _entry_of(table: str) -> AfterValidator:
    """Accept a name of the table, or somebody's own `"package.module:Class"`."""

    def check(name: str) -> str:
        try:
            check_name(table, name)
        except ConfigError:
            known = list(TABLES[table])
            allowed = f"must be one of {', '.join(known)}, or your own 'package.module:Class'"
            raise ValueError(allowed + nearest(name, known)) from None
        return name

    return AfterValidator(check)


LARGEST = 2**31 - 1  # of every count: far beyond what runs, small enough for every library below
MAX_THREADS = 1024
Count = Annotated[int, Field(ge=1, le=LARGEST)]
CountOrZero = Annotated[int, Field(ge=0, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class DataConfig(BaseModel):
    """What is read, and how it becomes tokens."""

    model_config = STRICT

    path: str | None = Field(
        default=None,
        min_length=1,
        description="Text, `.jsonl[.gz/.zst]` or `.parquet` file, folder of them, Hugging Face dataset folder, or a "
        "folder that `himoe prepare --out` wrote; first-level sub-folders or files are the domains. "
        "A relative path counts from the working directory. None: text that every Python installation has",
    )
    sources: dict[str, str] | None = Field(
        default=None,
        min_length=1,
        description='Several paths as `{ name = "path", … }`, each one domain of that name; replaces `data.path`',
    )
    text_column: str = Field(
        default="text", min_length=1, description="Field of a JSON line, or column of a table, that holds the text"
    )
    domain_column: str | None = Field(
        default=None,
        min_length=1,
        description="Field or column that names a document's domain. None: domains are folders or files",
    )
    tokenizer: str = Field(
        default="bpe",
        min_length=1,
        description="`bpe` is trained on the training part; `byte` reads the UTF-8 bytes as they are; else the path "
        "of a `tokenizer.json`, or of a folder with one or with GPT-2's `encoder.json` and `vocab.bpe`",
    )
    vocab_size: int = Field(
        default=4096, ge=258, le=LARGEST, description="Entries of the `bpe` vocabulary; other tokenizers have their own"
    )
    weights: dict[str, Annotated[float, Field(ge=0)]] | None = Field(
        default=None,
        min_length=1,
        description="Share of each domain in the training samples, `{ domain = share, … }`, together 1. "
        "None: every domain in proportion to its tokens",
    )
    deduplicate: bool = Field(default=False, description="Keep only the first of documents that are equal")
    cross_documents: bool = Field(default=False, description="Let attention see earlier documents of the same sequence")
    workers: int | None = Field(
        default=None, ge=1, le=MAX_THREADS, description="Processes that prepare the text. None: one per core"
    )
    held_out: float = Field(
        default=0.05,
        gt=0,
        lt=1,
        description="Share of each domain's documents kept for evaluation, chosen by document hash",
    )
    eval_tokens: int | None = Field(
        default=None,
        ge=1,
        le=LARGEST,
        description="Tokens of each domain that an evaluation during training reads; "
        "the final one reads all. None: always all",
    )


class ModelConfig(BaseModel):
    """The decoder around the mixture-of-experts layers."""

    model_config = STRICT

    dim: Count = Field(description="Width of the residual stream")
    num_layers: Count = Field(description="Decoder layers, each attention and a feed-forward part")
    num_heads: Count = Field(description="Query heads; divides `model.dim` into heads of even width")
    num_kv_heads: Count = Field(description="Key and value heads; divides `model.num_heads`")
    ffn_dim: Count = Field(description="Hidden width of the layers that are not mixture-of-experts layers")
    ffn: Literal["swiglu", "gelu", "relu", "relu2"] = Field(
        default="swiglu", description="Kind of the layers that are not mixture-of-experts layers"
    )
    tie_embeddings: bool = Field(default=True, description="Use the input embedding as the output head too")
    rope_theta: float = Field(default=10000.0, gt=0, description="Base of the rotary position embedding")
    qk_norm: bool = Field(default=True, description="Normalise queries and keys of each head")


class ScheduleEntry(BaseModel):
    """How a balancer's losses, or the moves of its state, change over the steps: the options of `himoe.Schedule`."""

    model_config = STRICT

    kind: Literal["warmup", "two_stage", "off_after"]
    steps: Count
    scales: Literal["losses", "moves"] | None = None


class BalancerEntry(BaseModel):
    """One balancer by name; every further key is an option of its constructor."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    name: Annotated[str, _entry_of("balancers")]
    schedule: ScheduleEntry | None = None
    per_group: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Return the keys beside `name`."""
        return dict(self.model_extra or {})


class PoolEntry(BaseModel):
    """Some experts of one kind and size."""

    model_config = STRICT

    num_experts: Count
    expert_dim: Count | None = None
    experts: Annotated[str, _entry_of("experts")] | None = None


class MoEConfig(BaseModel):
    """The mixture-of-experts layers: which they are, their size, and how tokens find experts."""

    model_config = STRICT

    every: CountOrZero = Field(
        default=1, description="Layer i has experts if (i + 1) is a multiple of this. 0: no layer has"
    )
    layers: list[int] | None = Field(
        default=None, description="Indices of the layers that have experts, from 0; replaces `moe.every`"
    )
    num_experts: Count = Field(description="Routed experts of a layer, E")
    num_groups: Count = Field(
        default=1, description="Groups of experts, G; equal and contiguous unless `moe.groups` is given"
    )
    groups: list[Annotated[list[int], Field(min_length=1)]] | None = Field(
        default=None,
        description="The experts of each group, where groups are unequal; every expert stands in exactly one",
    )
    top_k: Count = Field(description="Experts of each token, K, over all groups")
    top_k_per_group: list[Count] | None = Field(
        default=None, description="Experts of each token in each group, where they differ; they sum to `moe.top_k`"
    )
    expert_dim: Count = Field(description="Hidden width of one routed expert, F")
    shared_dim: CountOrZero = Field(
        default=0, description="Hidden width of the shared expert that every token passes. 0: none"
    )
    shared_gate: bool = Field(
        default=False, description="Weigh the shared expert of each token by a sigmoid that is learned"
    )
    experts: Annotated[str, _entry_of("experts")] = Field(
        default="swiglu", description="Kind of expert (`himoe list experts`)"
    )
    pools: list[PoolEntry] | None = Field(
        default=None,
        min_length=1,
        description="Experts of several kinds or sizes in one layer, in order of their numbers, each a table "
        "`{ num_experts, expert_dim, experts }`; what it leaves out is as above",
    )
    preset: Annotated[str, _entry_of("presets")] | None = Field(
        default="hi_moe",
        description="Router and balancing of one paper (`himoe list presets`). None, and the default once "
        "`moe.selector` is given: spelled out by selector, score and balancers",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Options of the preset (`himoe list presets NAME`)"
    )
    gate: Annotated[str, _entry_of("gates")] | None = Field(
        default=None,
        description="How a token becomes logits (`himoe list gates`), beside a selector. None: linear",
    )
    gate_options: dict[str, Any] = Field(default_factory=dict, description="Options of the gate")
    selector: Annotated[str, _entry_of("selectors")] | None = Field(
        default=None, description="How experts are chosen from scores (`himoe list selectors`), in place of a preset"
    )
    selector_options: dict[str, Any] = Field(default_factory=dict, description="Options of the selector")
    score: Annotated[str, _entry_of("scores")] | None = Field(
        default=None, description="How logits become scores (`himoe list scores`), beside a selector. None: softmax"
    )
    balancers: list[BalancerEntry] = Field(
        default_factory=list,
        description="Balancing strategies, each a table with `name` (`himoe list balancers`) and its options; "
        "`schedule = { kind, steps, scales }` changes its losses, or else the moves of its state, over the steps, "
        "`per_group = true` keeps one for each group; "
        "beside a preset they join its own",
    )
    renormalize: bool | None = Field(
        default=None,
        description="Divide the weights of a token's experts by their sum. None: as preset, score or selector "
        "were published, else true where `moe.top_k` is above 1, since a single weight would always be 1",
    )
    capacity_factor: float | None = Field(
        default=None,
        gt=0,
        description="Places of an expert, in multiples of its fair share; pairs beyond are dropped. None: no limit",
    )
    capacity_order: Literal["token_major", "column_major", "score", "batch_prioritised"] = Field(
        default="token_major",
        description="Who takes an expert's places first: token by token; all first choices before all second ones; "
        "the pairs of largest weight; or the tokens of largest weight. Only the first is causal",
    )
    backend: Literal["auto", "loop", "grouped"] = Field(default="auto", description="How the experts are computed")
    force: bool = Field(default=False, description="Train although a guard refuses the combination")
    allow_non_causal: bool = Field(
        default=False, description="Train although later tokens can change the routing of earlier ones"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        return fill_in(data)


class TrainConfig(BaseModel):
    """The training run."""

    model_config = STRICT

    steps: Count = Field(description="Optimizer steps")
    batch_size: Count = Field(description="Sequences of an optimizer step")
    accumulate: Count = Field(
        default=1,
        description="Micro-batches that a step's sequences are split into, to save memory; the batch stays as large",
    )
    seq_len: Count = Field(description="Tokens of a sequence")
    learning_rate: float = Field(gt=0, description="Highest learning rate, reached after the warm-up")
    min_learning_rate_ratio: float = Field(
        default=0.1, ge=0, le=1, description="Learning rate at the end, as a share of the highest"
    )
    warmup_steps: CountOrZero = Field(
        default=0, description="Steps over which the learning rate rises in a line from 0"
    )
    schedule: Literal["cosine", "wsd", "linear", "inverse_sqrt", "constant"] = Field(
        default="cosine",
        description="Learning rate after the warm-up: a cosine, constant with a linear decay at the end (`wsd`), "
        "a line down, ∝ 1/√step, or constant",
    )
    decay_fraction: float = Field(default=0.2, gt=0, le=1, description="Share of the steps in which `wsd` decays")
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="`muon`: orthogonalised momentum on the hidden weight matrices, each expert its own, "
        "and AdamW on the rest",
    )
    muon_momentum: Fraction = Field(default=0.95, description="Momentum of `muon`")
    weight_decay: float = Field(
        default=0.1,
        ge=0,
        description="Decoupled weight decay, on weight matrices only, never on norms, scales and biases",
    )
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.95), strict=False, description="AdamW's two decay rates")
    grad_clip: float = Field(default=1.0, gt=0, description="Largest norm of all gradients together")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="`bf16`: autocast, with fp32 weights and routing"
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Keep an exponential moving average of the weights, with this decay per step, and evaluate it. "
        "None: no average",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="Activations computed again in the backward pass to save memory: all but the results of large "
        "products (`selective`), or all of a layer (`full`); the routing is always kept",
    )
    compile: bool = Field(default=False, description="Compile each layer with `torch.compile`")
    init_from: str | None = Field(
        default=None,
        min_length=1,
        description="Run folder, or checkpoint folder in one, whose weights and tokenizer training starts from",
    )
    log_every: Count = Field(default=10, description="Steps between lines of `metrics.jsonl` and `load.jsonl`")
    eval_every: Count = Field(default=100, description="Steps between evaluations; the last step always evaluates")
    checkpoint_every: Count = Field(
        default=100, description="Steps between checkpoints; the last step always saves one"
    )
    keep_checkpoints: Count = Field(default=2, description="Checkpoints that stay on the disk, the newest")
    keep_every: Count | None = Field(
        default=None, description="Checkpoints at multiples of this step stay for good. None: none do"
    )
    keep_best: bool = Field(
        default=True, description="The checkpoint with the best evaluation during training stays too"
    )
    early_stop: Count | None = Field(
        default=None, description="End after this many evaluations in a row without a new best one. None: never"
    )
    stop_on_alarm: bool = Field(
        default=False, description="End at a checkpoint when an alarm goes off, instead of only reporting it"
    )
    log_to: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = Field(
        default_factory=list, description="Where lines go beside `metrics.jsonl`; each needs its own package"
    )
    threads: int | None = Field(
        default=None, ge=1, le=MAX_THREADS, description="CPU threads. None: what PyTorch chooses"
    )
