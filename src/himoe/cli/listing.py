"""`himoe list`: what can be put in a configuration."""

import json
import sys
from dataclasses import asdict, dataclass
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional

from himoe.cli.card_page import print_card
from himoe.cli.cards import card
from himoe.cli.catalogue import KINDS, SINGULAR, entries, table_of
from himoe.cli.parsing import Verb, option
from himoe.cli.tables import print_entries


@dataclass(kw_only=True)
class List(Verb):
    """List what a configuration can name, or show one entry in full.

    Examples:
      himoe list
          all tables: name, what it is, its paper
      himoe list presets
          one of them
      himoe list hi_moe
          one entry in full: source, formula, options, state, use
      himoe list balancers switch
          the same where two tables have the name
      himoe list balancers my_package.module:MyBalancer
          one of your own
      himoe list recipes lm_tiny > my.toml
          a recipe's text, to start a file of your own
    """

    kind: Annotated[Positional[str | None], option("[TABLE | NAME]")] = None
    """balancers, gates, selectors, scores, experts, presets or recipes; or an entry's name. Without it: all tables."""
    name: Annotated[Positional[str | None], option("[NAME]")] = None
    """One entry, in full."""

    def run(self, command: list[str]) -> int:  # noqa: ARG002
        """Print the tables, or one entry."""
        name = self.name or (self.kind if self.kind not in KINDS else None)
        if name:
            self._show(name, self.kind if self.name else None)
            return 0
        tables = {kind: entries(kind) for kind in ([self.kind] if self.kind else KINDS)}
        if self.as_json:
            print(json.dumps({kind: [asdict(entry) for entry in table] for kind, table in tables.items()}))
        else:
            print_entries(Console(), tables)
        return 0

    def _show(self, name: str, kind: str | None) -> None:
        """Print one entry's card, from the table that has it."""
        table = table_of(name, kind)
        if kind and kind != table:
            print(f"himoe: {name} is not in {kind}; it is a {SINGULAR[table]}:", file=sys.stderr)
        found = card(table, name)
        print(json.dumps(asdict(found))) if self.as_json else print_card(Console(), found)
