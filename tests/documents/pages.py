"""Pages that run: the code blocks of a Markdown file, executed from top to bottom in one folder.

A block whose first line is a comment with a file's name is written to that file. Other Python blocks run in one
namespace; every line of a `bash` block runs as a command, after what the block before it exported.
"""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
FILE = re.compile(r"# ([\w./-]+\.(?:py|toml))\n")


@dataclass
class Page:
    """A Markdown file and the folder that its code runs in."""

    text: str
    folder: Path
    namespace: dict = field(default_factory=dict)
    environment: dict = field(default_factory=lambda: dict(os.environ))
    ran: list[str] = field(default_factory=list)

    def run(self, languages: tuple[str, ...] = ("python", "toml", "bash")) -> list[str]:
        """Run all blocks; return what was run, in order."""
        for language, code in BLOCK.findall(self.text):
            if language in languages:
                self._block(language, code)
        return self.ran

    def _block(self, language: str, code: str) -> None:
        if named := FILE.match(code):
            (self.folder / named[1]).write_text(code, encoding="utf-8")
            self.ran.append(named[1])
        elif language == "python":
            exec(compile(code, f"<block {len(self.ran)}>", "exec"), self.namespace)
            self.ran.append("python")
        elif language == "bash":
            for line in code.splitlines():
                self._command(shlex.split(line, comments=True))

    def _command(self, words: list[str]) -> None:
        if words[:1] == ["export"]:
            for name, _, value in (word.partition("=") for word in words[1:]):
                known = [value, os.environ.get(name)] if name.endswith("PATH") else [value]
                self.environment[name] = os.pathsep.join(filter(None, known))
            return
        python = {"himoe": [sys.executable, "-m", "himoe"], "python": [sys.executable]}
        command = [*python[words[0]], *words[1:]]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        self.ran.append(shlex.join(words))
