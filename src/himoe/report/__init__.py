"""One self-contained HTML file that shows what a run did: `write_report(run)`. Never imports torch."""

from __future__ import annotations

from pathlib import Path

from himoe.errors import MissingExtraError, RunFolderError
from himoe.files import write_text
from himoe.report.read import RunFolder

__all__ = ["RunFolder", "write_report"]


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of the run folder `run` to `out` (default: report.html inside it) and return where it is.

    The file appears complete or not at all: it is written beside its place and then renamed.

    Raises:
        RunFolderError: `run` is not a run folder, one of its files is damaged, or `out` cannot be written.
        MissingExtraError: plotly is not installed.
    """
    folder = RunFolder.open(Path(run))
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtraError("plotly", "report") from error
    from himoe.report.sections import build_page

    target = folder.path / "report.html" if out is None else Path(out)
    page = build_page(folder, get_plotlyjs())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, page)
    except OSError as error:
        raise RunFolderError(f"cannot write the report to {target}: {error.strerror}; give another file") from error
    return target
