"""The sections `data`, `model` and `train` of a configuration: every key, its unit and its default stand here once.

`docs/configuration.md` is written from these descriptions.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from himoe.config.kinds import LARGEST, MAX_THREADS, STRICT, Count, CountOrZero, Fraction


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
