"""comfy-cli as a subprocess: without questions, without telling anybody, in a home of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run(*command: str, folder: Path, home: Path) -> str:
    """Run a command that has to succeed, and return what it said."""
    environment = {**os.environ, "HOME": str(home), "USERPROFILE": str(home)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def comfy(*arguments: str, folder: Path, home: Path) -> str:
    """Run comfy-cli; its first run in a home would ask whether it may report its use."""
    program = str(Path(sys.executable).with_name("comfy"))
    if not any(home.iterdir()):
        run(program, "--skip-prompt", "tracking", "disable", folder=folder, home=home)
    return run(program, "--skip-prompt", *arguments, folder=folder, home=home)
