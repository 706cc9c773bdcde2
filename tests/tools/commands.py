"""Commands that have to succeed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path


def succeed(command: Sequence[str], folder: Path, **environment: str) -> str:
    """Run a command in a folder, and return what it said.

    Args:
        command: The program and its arguments.
        folder: Where it runs.
        environment: Beside what this process has.
    """
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr
