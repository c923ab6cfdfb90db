"""`himoe prepare`: from text to a corpus that training opens at once."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import Positional, UseAppendAction

from himoe.cli.parsing import Verb, option
from himoe.config import DataConfig, load_config
from himoe.errors import ConfigError

SAMPLES = 2  # of each domain
OPTIONS = ("tokenizer", "vocab_size", "text_column", "domain_column", "held_out", "deduplicate", "workers")


@dataclass(kw_only=True)
class Prepare(Verb):
    """Turn text into tokens on disk, once; show what came out.

    Examples:
      himoe prepare novels/
          into the cache, where `himoe train --data novels/` finds it
      himoe prepare crawl.jsonl.zst --domain-column site --deduplicate
          a field names the domain; equal documents are kept once
      himoe prepare corpus/ --tokenizer gpt2/tokenizer.json --out prepared/
          a tokenizer you have, a folder you can move: himoe train --data prepared/
      himoe prepare --recipe my.toml
          what the table [data] of a configuration says
      himoe prepare prepared/ --inspect
          domains, counts and samples of what is there
    """

    path: Annotated[Positional[Path | None], option("[PATH]")] = None
    """Text or table file, folder, or folder that was prepared. Without it: text that comes with Python."""
    recipe: Annotated[str | None, option("NAME | FILE.toml")] = None
    """Take the data settings of a recipe or a configuration file. Without it: lm_demo, as `himoe train` does."""
    out: Annotated[Path | None, option("DIR")] = None
    """Folder to write. Without it: one in the cache."""
    tokenizer: Annotated[str | None, option("bpe | byte | PATH")] = None
    """Learn one, use bytes, or use a tokenizer.json or a folder with GPT-2's files."""
    vocab_size: Annotated[int | None, option("N")] = None
    """Entries of the tokenizer to learn."""
    text_column: Annotated[str | None, option("NAME")] = None
    """Field of a JSON line, or column of a table, that holds the text."""
    domain_column: Annotated[str | None, option("NAME")] = None
    """Field or column that names a document's domain. Without it: first-level folders or files are domains."""
    held_out: Annotated[float | None, option("SHARE")] = None
    """Share of each domain's documents kept for evaluation."""
    deduplicate: Annotated[bool, option()] = False
    """Keep only the first of documents that are equal."""
    workers: Annotated[int | None, option("N")] = None
    """Processes. Without it: one per core."""
    changes: Annotated[UseAppendAction[tuple[str, ...]], option("KEY=VALUE", "set")] = ()
    """Change one value of the configuration, such as data.sources; may be given often."""
    inspect: Annotated[bool, option()] = False
    """Show settings and samples too."""
    verify: Annotated[bool, option()] = False
    """Check every byte of what was prepared, now or before."""
    dry_run: Annotated[bool, option()] = False
    """Show what would be read, and write nothing."""

    def run(self, command: list[str]) -> int:  # noqa: ARG002
        """Prepare, or find what was prepared, and print what it holds."""
        from himoe.cli.corpus_tables import print_corpus, print_plan
        from himoe.data import prepare, verify
        from himoe.data.inspection import inspect_corpus
        from himoe.data.preparation.progress import preparing

        data = self._settings()
        console = Console(stderr=self.as_json)
        if self.dry_run:
            planned = _plan(data, self.out)
            print(json.dumps(planned)) if self.as_json else print_plan(console, planned)
            return 0
        began = perf_counter()
        with preparing(console) as progress:
            corpus = prepare(**_source(data), **_tokens(data), workers=data.workers, out=self.out, progress=progress)
            checked = verify(corpus.folder, progress) if self.verify else None
        found = inspect_corpus(corpus, samples=SAMPLES if self.inspect else 0)
        found |= {"seconds": round(perf_counter() - began, 1), "verified": checked is not None, "train": self._train()}
        if self.as_json:
            print(json.dumps(found))
        else:
            print_corpus(console, found)
        return 0

    def _settings(self) -> DataConfig:
        """Return the table [data] with this command's options over it."""
        from himoe.data.corpus import is_prepared

        given = self._given()
        where = {"path": str(self.path), "sources": "none"} if self.path is not None else {}
        data = load_config(self.recipe, sets=self.changes, overrides={"data": given | where}).data
        unused = [*given, *["out"] * bool(self.out)]
        if unused and data.path and is_prepared(Path(data.path)):
            raise ConfigError(
                f"{data.path} is prepared already, as it is: leave --{unused[0].replace('_', '-')} out, "
                "or prepare the text itself once more"
            )
        return data

    def _given(self) -> dict[str, Any]:
        """Return the options that were given; a number 0 was, and is refused where it makes no sense."""
        values = {key: getattr(self, key) for key in OPTIONS}
        return {key: value for key, value in values.items() if value is not None and value is not False}

    def _train(self) -> str:
        """Return the command that trains on what was prepared."""
        if self.out:
            return f"himoe train --data {shlex.quote(str(self.out))}"
        words = ["himoe", "train", *[self.recipe] * bool(self.recipe)]
        words += ["--data", str(self.path)] if self.path else []
        for key, value in self._given().items():
            if key != "workers":
                words += [f"--data.{key.replace('_', '-')}", *[str(value)] * (value is not True)]
        return shlex.join([*words, *(word for change in self.changes for word in ("--set", change))])


def _source(data: DataConfig) -> dict[str, Any]:
    """Return the arguments of `prepare` that say what is read."""
    return {
        "path": Path(data.path) if data.path else None,
        "sources": {name: Path(path) for name, path in data.sources.items()} if data.sources else None,
        "text_column": data.text_column,
        "domain_column": data.domain_column,
    }


def _tokens(data: DataConfig) -> dict[str, Any]:
    """Return the arguments of `prepare` that say what becomes of it."""
    keys = ("tokenizer", "vocab_size", "held_out", "deduplicate")
    return {key: getattr(data, key) for key in keys}


def _plan(data: DataConfig, out: Path | None) -> dict[str, Any]:
    """Return what would be read and where it would go."""
    from himoe.data.corpus import is_prepared
    from himoe.data.preparation.prepare import find_prepared, find_source

    if data.path and is_prepared(Path(data.path)):
        return {"text": data.path, "prepared": data.path}
    source = find_source(**_source(data))
    folder, state = find_prepared(source, **_tokens(data), out=out)
    return {
        "text": source.name,
        "bytes": sum(unit.size for unit in source.units),
        "parts": len(source.units),
        "first": source.units[0].label if source.units else None,
        **_tokens(data),
        "prepared": str(folder) if state == "made" else None,
        "out": str(out) if out else None,
        "state": state,
    }
