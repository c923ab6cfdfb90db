"""What the verbs of `himoe bench` share that measure: threads, device, and one line for a word that is not known."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from himoe.cli.parsing import Verb, option
from himoe.errors import ConfigError, nearest


@dataclass(kw_only=True)
class MeasuringVerb(Verb):
    """What the verbs that measure share."""

    threads: Annotated[int | None, option("N")] = None
    """Threads that products may use. Without it: what torch takes, one for every core."""
    device: Annotated[str | None, option("cpu|cuda")] = None
    """Where to measure. Without it: the GPU where there is one."""

    def prepare(self) -> str:
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


def known_words(name: str, given: Sequence[str], known: Sequence[str] | dict[str, Any]) -> None:
    """Raise ConfigError for the first word of an option that is not known."""
    for word in given:
        if word not in known:
            raise ConfigError(f"{name} is {word!r}; known: {', '.join(known)}{nearest(word, list(known))}")
