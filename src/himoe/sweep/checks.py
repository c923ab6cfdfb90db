"""What is checked of all runs before the first one starts: that each model can be built, and its text can be read.

The text is prepared here once, so that the workers find it in the cache.
"""

from collections.abc import Sequence

from rich.console import Console

from himoe.config.toml import format_value
from himoe.errors import ConfigError, HimoeError
from himoe.sweep.expand import Run
from himoe.sweep.spec import one_line


def check_runs(runs: Sequence[Run], console: Console, *, text: bool = True) -> None:
    """Refuse, in one line that names the run, what training would refuse. Imports PyTorch.

    Args:
        runs: to check.
        console: where progress of the text's preparation goes.
        text: whether to prepare the text too.
    """
    from himoe.build import check_model
    from himoe.train.writers import check_writers
    from himoe.trained import load_corpus

    models: set[str] = set()
    texts: set[str] = set()
    for run in runs:
        config = run.config
        model = format_value(
            config.model_copy(update={"seed": 0, "train": None, "name": ""}).model_dump(warnings=False)
        )
        data = format_value(config.data.model_dump())
        try:
            if model not in models:
                check_model(config)
                models.add(model)
            check_writers(config.train.log_to)
            if text and data not in texts and config.train.init_from is None:
                load_corpus(config, console)
                texts.add(data)
        except HimoeError as error:
            raise ConfigError(f"{run.name or 'the run'}: {one_line(error)}") from None
