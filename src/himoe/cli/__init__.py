"""The command line: `himoe VERB …`. Each verb is one file; what all of them share is here.

Bad input gets one clear line on stderr and exit status 2, Ctrl-C 130; a traceback appears only with `--debug`.
PyTorch is imported only where it is needed, after the arguments have been checked.
"""

import errno
import inspect
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

import himoe
from himoe.cli.analyze import Analyze
from himoe.cli.bench import BENCH_VERBS, Bench
from himoe.cli.check import Check
from himoe.cli.compare import Compare
from himoe.cli.evaluate import Eval
from himoe.cli.generate import Generate
from himoe.cli.listing import List
from himoe.cli.parsing import parse
from himoe.cli.plan import Plan
from himoe.cli.prepare import Prepare
from himoe.cli.recommend import Recommend
from himoe.cli.report import Report
from himoe.cli.sweep import SWEEP_VERBS, Sweep
from himoe.cli.train import Train
from himoe.errors import ConfigError, HimoeError, HimoeWarning, RunsFailedError, nearest

VERBS = {
    "prepare": Prepare,
    "train": Train,
    "eval": Eval,
    "generate": Generate,
    "report": Report,
    "plan": Plan,
    "sweep": Sweep,
    "compare": Compare,
    "analyze": Analyze,
    "recommend": Recommend,
    "check": Check,
    "bench": Bench,
    "list": List,
}

ALLOCATION_FAILED = ("can't allocate memory", "not enough memory", "out of memory", "storage size calculation overflow")
LESS_MEMORY = "make its sizes or train.seq_len smaller, or raise train.accumulate (docs/configuration.md)"

HELP = """\
usage: himoe VERB [arguments]

Train language models with sparse mixture-of-experts layers, and see how evenly
their experts are used.

Verbs:
{verbs}

Examples:
  himoe train                         about 5 minutes on text you already have
  himoe train lm_tiny --out runs/try  20 steps, to try things out
  himoe eval runs/try                 its held-out bits per byte again
  himoe plan lm_small                 what a model costs, before it is built
  himoe list balancers                what can be put in a configuration

`himoe help VERB` explains a verb, with examples; `himoe --version` names the
version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 where runs failed, 2 for bad input, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Waiting threads soon sleep instead of spinning on: spinning makes a machine that other work shares crawl.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    debug = "--debug" in arguments
    with warnings.catch_warnings():
        _show_our_warnings_in_one_line()
        try:
            status = _dispatch(arguments)
            sys.stdout.flush()
            return status
        except KeyboardInterrupt:
            return _fail("stopped", 130, debug)
        except HimoeError as error:
            return _fail(str(error), 1 if isinstance(error, RunsFailedError) else 2, debug)
        except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:
            return _fail(_describe(error), 2, debug)
        except (MemoryError, RuntimeError) as error:
            if not _is_lack_of_memory(error):
                raise
            return _fail(f"not enough memory for this model: {LESS_MEMORY}", 2, debug)


def _dispatch(arguments: list[str]) -> int:
    """Run the verb that the arguments name."""
    words = arguments[1:] if arguments[:1] == ["--debug"] else arguments
    verb, *rest = words or ["--help"]
    if verb in {"-h", "--help", "help"}:
        if not rest:
            print(help_text())
            return 0
        verb, rest = rest[0], [*rest[1:], "--help"]
    if verb == "--version":
        print(f"himoe {himoe.__version__}")
        return 0
    if verb not in VERBS:
        raise ConfigError(f"no verb {verb!r}; known: {', '.join(VERBS)}{nearest(verb, list(VERBS))}")
    kind, prog = VERBS[verb], f"himoe {verb}"
    if verb == "sweep" and rest and rest[0] in SWEEP_VERBS:
        kind, prog, rest = SWEEP_VERBS[rest[0]], f"{prog} {rest[0]}", rest[1:]
    if verb == "bench" and rest and not rest[0].startswith("-"):
        if rest[0] not in BENCH_VERBS:
            known = ", ".join(BENCH_VERBS)
            raise ConfigError(f"no verb {rest[0]!r} of bench; known: {known}{nearest(rest[0], list(BENCH_VERBS))}")
        kind, prog, rest = BENCH_VERBS[rest[0]], f"{prog} {rest[0]}", rest[1:]
    command = parse(kind, prog, rest)
    return 0 if command is None else command.run(["himoe", *arguments])


def help_text() -> str:
    """Return the help of the program itself, with the first line of each verb."""
    first = {name: (inspect.getdoc(verb) or "").partition("\n")[0] for name, verb in VERBS.items()}
    return HELP.format(verbs="\n".join(f"  {name:<10}{line}" for name, line in first.items()))


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"himoe: {message}", file=sys.stderr)
    return status


def _describe(error: OSError) -> str:
    """Return one line for what the operating system refused."""
    where = f": {error.filename}" if error.filename else ""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"no space left on the disk{where}; free some and try again (training goes on with --resume)"
    return f"{error.strerror or error}{where}"


def _is_lack_of_memory(error: Exception) -> bool:
    """Tell a failed allocation from other runtime errors; PyTorch has a type of its own for it on a GPU only."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in ALLOCATION_FAILED)


def _show_our_warnings_in_one_line() -> None:
    """Print a `HimoeWarning` without the file and source line that Python adds; leave others as they are."""
    usual = warnings.showwarning

    def show(message, category, filename, lineno, file=None, line=None):
        if issubclass(category, HimoeWarning):
            print(f"himoe: warning: {message}", file=sys.stderr)
        else:
            usual(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    warnings.simplefilter("default", HimoeWarning)
