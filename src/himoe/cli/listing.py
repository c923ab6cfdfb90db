"""`himoe list`: what can be put in a configuration."""

import json
from dataclasses import asdict, dataclass
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional

from himoe.cli.catalogue import KINDS, details, entries
from himoe.cli.parsing import Verb, option
from himoe.cli.tables import print_details, print_entries

# How an entry stands in a configuration file.
USE = {
    "presets": '[moe]\npreset = "{0}"\n\n[moe.options]  # its own options follow, a line each',
    "selectors": '[moe]\nselector = "{0}"  # in place of a preset\n\n[[moe.balancers]]\nname = "switch"',
    "scores": '[moe]\nselector = "top_k"\nscore = "{0}"\n\n[[moe.balancers]]\nname = "switch"',
    "experts": '[moe]\nexperts = "{0}"',
    "balancers": '[[moe.balancers]]\nname = "{0}"  # its own options follow, a line each',
}


@dataclass(kw_only=True)
class List(Verb):
    """List balancers, selectors, scores, experts, presets and recipes.

    Examples:
      himoe list
          all tables
      himoe list presets
          one of them
      himoe list balancers loss_free
          one entry in full, with its options
      himoe list recipes lm_tiny > my.toml
          a recipe's text, to start a file of your own
    """

    kind: Annotated[Positional[str | None], option("[TABLE]")] = None
    """balancers, selectors, scores, experts, presets or recipes. Without it: all."""
    name: Annotated[Positional[str | None], option("[NAME]")] = None
    """One entry, in full."""

    def run(self, command: list[str]) -> int:  # noqa: ARG002
        """Print the tables, or one entry."""
        if self.kind and self.name:
            found = details(self.kind, self.name)
            print(json.dumps(found)) if self.as_json else print_details(found, USE.get(self.kind, "").format(self.name))
            return 0
        tables = {kind: entries(kind) for kind in ([self.kind] if self.kind else KINDS)}
        if self.as_json:
            print(json.dumps({kind: [asdict(entry) for entry in table] for kind, table in tables.items()}))
        else:
            print_entries(Console(), tables)
        return 0
