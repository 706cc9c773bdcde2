"""comfy-cli as a subprocess: without questions, without telling anybody, in a home of its own."""

from __future__ import annotations

import sys
from pathlib import Path

from commands import succeed


def run(*command: str, folder: Path, home: Path) -> str:
    """Run a command that has to succeed, and return what it said."""
    return succeed(command, folder, HOME=str(home), USERPROFILE=str(home))


def comfy(*arguments: str, folder: Path, home: Path) -> str:
    """Run comfy-cli; its first run in a home would ask whether it may report its use."""
    program = str(Path(sys.executable).with_name("comfy"))
    if not any(home.iterdir()):
        run(program, "--skip-prompt", "tracking", "disable", folder=folder, home=home)
    return run(program, "--skip-prompt", *arguments, folder=folder, home=home)
