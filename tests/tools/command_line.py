"""Running `python -m flux_fp4` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pack_import import ROOT


def command(*arguments: object) -> list[str]:
    """Return the command line; the pack is started by its path, as without an installation."""
    return [sys.executable, str(ROOT), *map(str, arguments)]


def run_command(
    *arguments: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end, whatever its exit code."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
