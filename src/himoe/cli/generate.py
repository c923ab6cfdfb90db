"""`himoe generate`: text from a trained model, shown as it is written."""

import json
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction

from himoe.cli.folders import existing_run
from himoe.cli.parsing import Verb, option
from himoe.errors import ConfigError, DataError, HimoeWarning

if TYPE_CHECKING:
    from himoe.models import TextStream
    from himoe.trained import LoadedRun

# What must not reach a terminal: a model may write any byte, also those that move the cursor or change the title.
CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}")


@dataclass(kw_only=True)
class Generate(Verb):
    """Continue texts with a run's model, or let it start one.

    Examples:
      himoe generate runs/novels
          a document from its beginning
      himoe generate runs/novels --prompt "It was" --prompt "She" --num-samples 3
          three continuations of each of two texts, written at the same time
      himoe generate runs/novels --prompt-file - --temperature 0 < start.txt
          the likeliest continuation of what comes on standard input
    """

    run_folder: Annotated[Positional[Path | None], option("RUN")] = None
    """Run folder that `himoe train` wrote."""
    prompt: Annotated[UseAppendAction[tuple[str, ...]], option("TEXT")] = ()
    """Text to continue, the start of a document; may be given often. Without any prompt: an empty one."""
    prompt_file: Annotated[UseAppendAction[tuple[Path, ...]], option("FILE")] = ()
    """Text to continue, in a file; its last line break is left out. - is standard input. May be given often."""
    num_samples: Annotated[int, option("N")] = 1
    """Continuations of each prompt. Without it: 1."""
    max_tokens: Annotated[int, option("N")] = 200
    """Most new tokens of each; the end of a document ends it before. Without it: 200."""
    temperature: Annotated[float, option("T")] = 0.8
    """How bold: 0 takes the likeliest token every time, 1 draws as the model says. Without it: 0.8."""
    top_k: Annotated[int | None, option("K")] = None
    """Draw from the K likeliest tokens only. Without it: from all."""
    top_p: Annotated[float, option("P")] = 0.95
    """Draw from the fewest likeliest tokens whose probabilities reach P. Without it: 0.95."""
    seed: Annotated[int, option("N")] = 0
    """The same seed gives a prompt the same continuations, whatever else is asked. Without it: 0."""
    checkpoint: Annotated[str | None, option("NAME")] = None
    """Folder under RUN/checkpoints, or best, or last. Without it: the last one."""
    no_ema: Annotated[bool, option()] = False
    """Take the weights of the last step also where the run averaged them."""

    def run(self, command: list[str]) -> int:  # noqa: ARG002
        """Write the continuations to standard output, and the speed to standard error."""
        run = existing_run(self.run_folder)
        if self.num_samples < 1:
            raise ConfigError(f"--num-samples is {self.num_samples}; it must be at least 1")
        prompts = [*self.prompt, *map(_read, self.prompt_file)] or [""]
        from himoe.trained import load_run, set_threads

        loaded = load_run(run, self.checkpoint, ema=not self.no_ema)
        set_threads(loaded.config)
        start = time.perf_counter()
        rows = [_Row(prompt, sample) for prompt in prompts for sample in range(self.num_samples)]
        page = None if self.as_json else _Page(rows)
        for _ in self._write(loaded, rows):
            if page is not None:
                page.show()
        seconds = time.perf_counter() - start
        tokens = sum(row.tokens for row in rows)
        speed = {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
        if page is None:
            origin = {"run": str(run), "checkpoint": loaded.checkpoint.name, "weights": loaded.weights}
            print(json.dumps({**origin, "samples": [row.record() for row in rows], **speed}))
        else:
            print()
        print(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.4g} tokens/s", file=sys.stderr)
        return 0

    def _write(self, loaded: "LoadedRun", rows: "list[_Row]") -> Iterator[None]:
        """Let every row grow by a token; stops after each."""
        import torch

        from himoe.models import TextStream, generate

        end = loaded.tokenizer.end_of_document
        # As in training, a document starts behind the token that ended the one before.
        ids = {prompt: [end, *loaded.tokenizer.encode(prompt)] for prompt in {row.prompt for row in rows}}
        longest, known = max(map(len, ids.values())) + self.max_tokens - 1, loaded.config.train.seq_len
        if longest > known:
            warnings.warn(
                f"prompt and --max-tokens make up to {longest} tokens, training saw {known} at once: "
                "what comes beyond may be worse",
                HimoeWarning,
                stacklevel=2,
            )
        steps = generate(
            loaded.model,
            [ids[row.prompt] for row in rows],
            max_new_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            stop={end},
            seed=self.seed,
        )
        streams = [TextStream(loaded.tokenizer.decode, ids[row.prompt]) for row in rows]
        device = next(loaded.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=loaded.config.train.precision == "bf16"):
            for tokens in steps:
                for row, token, stream in zip(rows, tokens, streams, strict=True):
                    if token is not None:
                        row.add(token, stream, ended=token == end, full=row.tokens + 1 == self.max_tokens)
                yield


@dataclass
class _Row:
    """One continuation: what it says so far, its number of tokens, and whether its document ended."""

    prompt: str
    sample: int
    text: str = ""
    tokens: int = 0
    ended: bool = False
    finished: bool = False

    def add(self, token: int, stream: "TextStream", *, ended: bool, full: bool) -> None:
        self.tokens += 1
        self.ended, self.finished = ended, ended or full
        self.text += "" if ended else stream.add(token)
        if self.finished:
            self.text += stream.end()

    def record(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "sample": self.sample,
            "text": self.text,
            "tokens": self.tokens,
            "ended": self.ended,
        }


class _Page:
    """Prints rows one below the other: the first unfinished one as it grows, those below it when their turn comes."""

    def __init__(self, rows: list[_Row]) -> None:
        self.rows, self.current, self.printed = rows, -1, 0

    def show(self) -> None:
        """Print what is new."""
        if self.current < 0:
            self._turn()
        self._grow()
        while self.rows[self.current].finished and self.current + 1 < len(self.rows):
            self._print("\n\n")
            self._turn()
            self._grow()

    def _turn(self) -> None:
        self.current, self.printed = self.current + 1, 0
        if len(self.rows) > 1:
            self._print(f"── {self.current + 1} of {len(self.rows)} ──\n")
        self._print(self.rows[self.current].prompt)

    def _grow(self) -> None:
        text = self.rows[self.current].text
        self._print(text[self.printed :])
        self.printed = len(text)

    def _print(self, text: str) -> None:
        print(text.translate(CONTROL) if sys.stdout.isatty() else text, end="", flush=True)


def _read(path: Path) -> str:
    where = "standard input" if str(path) == "-" else str(path)
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return content.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text: byte {error.start} cannot be read; give a text file") from None
