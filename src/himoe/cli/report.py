"""`himoe report`: a run as one HTML page."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from himoe.cli.folders import existing_run
from himoe.cli.parsing import Verb, option


@dataclass(kw_only=True)
class Report(Verb):
    """Write a run's page anew: loss, domains, the load of every expert.

    Examples:
      himoe report runs/novels
          writes runs/novels/report.html, one file that needs no network
      himoe report runs/novels --out novels.html
          writes it elsewhere; a run that still trains can be looked at too
    """

    run_folder: Annotated[Positional[Path | None], option("RUN")] = None
    """Run folder that `himoe train` wrote."""
    out: Annotated[Path | None, option("FILE")] = None
    """File to write. Without it: RUN/report.html."""

    def run(self, command: list[str]) -> int:  # noqa: ARG002
        """Write the page and print its path."""
        run = existing_run(self.run_folder)
        from himoe.report import write_report

        page = write_report(run, self.out)
        print(json.dumps({"report": str(page)}) if self.as_json else page)
        return 0
