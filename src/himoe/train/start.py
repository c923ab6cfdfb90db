"""How a trainer starts: what it is put together from, with random weights or with those of another run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from himoe.build import build_groups, build_model
from himoe.config import Config
from himoe.data import ByteTokenizer, Corpus, Tokenizer, TrainingOrder, load_tokenizer
from himoe.errors import CheckpointError, ConfigError, DataError
from himoe.nn import moe_layers
from himoe.run_folder import run_of
from himoe.train.batches import Batches
from himoe.train.checkpoint import AVERAGE, MODEL, Checkpoint, load_model_tensors, open_checkpoint
from himoe.train.environment import best_device
from himoe.train.loop import Trainer
from himoe.train.optimizer import build_optimizer
from himoe.train.schedule import schedule_of
from himoe.train.statistics import Statistics


@dataclass(frozen=True)
class WarmStart:
    """A trained model to start from: its weights, averaged where the run averaged them, its buffers and tokenizer."""

    run: Path
    checkpoint: Checkpoint
    tokenizer: Tokenizer

    @classmethod
    def find(cls, path: Path) -> "WarmStart":
        """Read what `train.init_from` names: a run folder, of which the newest whole checkpoint, or a checkpoint.

        Raises RunFolderError or CheckpointError when it is neither, or damaged.
        """
        run = run_of(path)
        checkpoint = open_checkpoint(run, None if run == path else path.name)
        return cls(run, checkpoint, load_tokenizer(run / "tokenizer.json"))

    def with_tokenizer(self, config: Config) -> Config:
        """Return the configuration with this run's tokenizer; raises ConfigError where it asks for another one.

        The default, "bpe", asks for none in particular.
        """
        given = config.data.tokenizer
        if given != "bpe":
            self.check(ByteTokenizer() if given == "byte" else load_tokenizer(Path(given)), f"data.tokenizer = {given}")
            return config
        data = config.data.model_copy(update={"tokenizer": str(self.run / "tokenizer.json")})
        return config.model_copy(update={"data": data})

    def check(self, tokenizer: Tokenizer, where: str) -> None:
        """Raise ConfigError naming both unless `tokenizer` is the one that the weights were trained with."""
        if tokenizer.hash != self.tokenizer.hash:
            raise ConfigError(
                f"{where} is another tokenizer ({tokenizer.name}, {tokenizer.vocab_size} ids) than that of "
                f"train.init_from = {self.run} ({self.tokenizer.name}, {self.tokenizer.vocab_size} ids); leave it out "
                "to take that one"
            )

    def put_into(self, model: nn.Module) -> None:
        """Load weights and balancer state. Raises CheckpointError naming what does not fit the model."""
        try:
            load_model_tensors(model, self.checkpoint.averaged_model, self.checkpoint.path)
        except CheckpointError as error:
            raise CheckpointError(
                f"train.init_from: {error}; take the model's keys from {self.run / 'config.json'}"
            ) from error

    def record(self) -> dict[str, Any]:
        """Return what env.json says of it."""
        averaged = self.checkpoint.average is not None
        return {
            "run": str(self.run),
            "step": self.checkpoint.state["step"],
            "weights": "averaged" if averaged else "trained",
            "sha256": self.checkpoint.state["files"][AVERAGE if averaged else MODEL]["sha256"],
        }


def build_trainer(config: Config, corpus: Corpus, start: WarmStart | None = None) -> Trainer:
    """Build order, model, optimizer and statistics.

    Raises ConfigError for what cannot be built, DataError for a text too short for one batch, CheckpointError for a
    `start` that does not fit.
    """
    settings = config.train
    batches = _build_batches(config, corpus)
    model = build_model(config, corpus.tokenizer.vocab_size)
    if start:
        start.check(corpus.tokenizer, f"that of the data, {corpus.name},")
        start.put_into(model)
    model = model.to(best_device())
    model.recompute = settings.recompute
    if settings.compile:
        model.compile_blocks()
    return Trainer(
        model,
        batches,
        optimizer=build_optimizer(
            model,
            settings.learning_rate,
            optimizer=settings.optimizer,
            weight_decay=settings.weight_decay,
            betas=settings.betas,
            muon_momentum=settings.muon_momentum,
        ),
        learning_rate=schedule_of(settings.model_dump()),
        statistics=Statistics(
            model.moe_layer_indices(),
            build_groups(config.moe),
            routers=[layer.router for layer in moe_layers(model)],
            device=best_device(),
        ),
        grad_clip=settings.grad_clip,
        precision=settings.precision,
        ema_decay=settings.ema_decay,
        seed=config.seed,
    )


def _build_batches(config: Config, corpus: Corpus) -> Batches:
    settings = config.train
    order = TrainingOrder(corpus.train, settings.seq_len, config.seed, weights=config.data.weights)
    if order.windows_per_epoch < settings.batch_size:
        raise DataError(
            f"the training text is too short for one batch: it gives {order.windows_per_epoch} of its "
            f"train.batch_size = {settings.batch_size} sequences of train.seq_len = {settings.seq_len}; "
            "give more text or lower one of the two"
        )
    return Batches(
        order,
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        end_of_document=corpus.tokenizer.end_of_document,
        cross_documents=config.data.cross_documents,
    )
