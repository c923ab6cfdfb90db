"""One self-contained HTML file that shows what a run did: `write_report(run)`. Never imports torch."""

from __future__ import annotations

from pathlib import Path

from himoe.errors import RunFolderError
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
    from himoe.report.page import write_document

    def build(plotly: str) -> str:
        from himoe.report.sections import build_page

        return build_page(folder, plotly)

    target = folder.path / "report.html" if out is None else Path(out)
    return write_document(build, target, extra="report", error=RunFolderError)
