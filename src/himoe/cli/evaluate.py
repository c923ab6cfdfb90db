"""`himoe eval`: a trained model on its held-out text, or on other text."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, UseAppendAction

from himoe.cli.folders import existing_run
from himoe.cli.parsing import Verb, option
from himoe.cli.tables import print_evaluation
from himoe.errors import ConfigError


@dataclass(kw_only=True)
class Eval(Verb):
    """Score a run's model on each domain, in bits per byte and perplexity.

    Examples:
      himoe eval runs/novels
          the last checkpoint on the text that training held out
      himoe eval runs/novels --data letters/
          the same model on other text, all of it
      himoe eval runs/novels --data de=german.txt --data fr=french.jsonl
          several texts, each a domain
      himoe eval runs/novels --data chats.parquet --domain-column topic
          tables and JSON lines, with the domain in a column
      himoe eval runs/novels --checkpoint best --json
          the best checkpoint, with every number, as JSON for a program
    """

    run_folder: Annotated[Positional[Path | None], option("RUN")] = None
    """Run folder that `himoe train` wrote."""
    data: Annotated[UseAppendAction[tuple[str, ...]], option("[NAME=]PATH")] = ()
    """Any text that `himoe prepare` reads; several with names are domains. Without it: the run's held-out text."""
    text_column: Annotated[str, option("NAME")] = "text"
    """Field or column of --data that holds the text. Without it: text."""
    domain_column: Annotated[str | None, option("NAME")] = None
    """Field or column of --data that names the domain. Without it: domains are folders or files."""
    checkpoint: Annotated[str | None, option("NAME")] = None
    """Folder under RUN/checkpoints, or best, or last. Without it: the last one."""
    no_ema: Annotated[bool, option()] = False
    """Take the weights of the last step also where the run averaged them."""
    seq_len: Annotated[int | None, option("N")] = None
    """Tokens that are read at once. Without it: as in training."""

    def run(self, command: list[str]) -> int:  # noqa: ARG002
        """Evaluate, and print the tables."""
        run = existing_run(self.run_folder)
        data = _sources(self.data)
        if data is None and (self.domain_column or self.text_column != "text"):
            raise ConfigError("--text-column and --domain-column are of the text at --data, which was not given")
        if isinstance(data, dict) and self.domain_column:
            raise ConfigError("--domain-column: several --data are one domain each; leave one of the two out")
        from himoe.trained import evaluate

        console = Console(stderr=self.as_json)
        result = evaluate(
            run,
            data=data,
            text_column=self.text_column,
            domain_column=self.domain_column,
            checkpoint=self.checkpoint,
            ema=not self.no_ema,
            seq_len=self.seq_len,
            console=console,
        )
        if self.as_json:
            print(json.dumps(result))
        else:
            print_evaluation(console, result)
        return 0


def _sources(given: Sequence[str]) -> Path | dict[str, Path] | None:
    """Return the one path that was given, or the paths by name; raises ConfigError for what is no such thing."""
    if missing := [text for text in given if not text.partition("=")[2 * ("=" in text)]]:
        raise ConfigError(f"--data {missing[0]!r} names no path; give --data PATH or --data NAME=PATH")
    named = [text.partition("=") for text in given if "=" in text and not Path(text).exists()]
    if not named and len(given) <= 1:
        return Path(given[0]) if given else None
    if len(named) < len(given):
        raise ConfigError("several --data need names: --data NAME=PATH --data NAME=PATH, each a domain")
    names = [name for name, _, _ in named]
    if wrong := [name for name in names if not name or names.count(name) > 1]:
        raise ConfigError(f"--data {wrong[0]}=… : every NAME=PATH needs a name of its own")
    return {name: Path(path) for name, _, path in named}
