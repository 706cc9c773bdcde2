"""Running a script of tests/browser in node: the real frontend in headless Chromium."""

from __future__ import annotations

import json
import shutil
import subprocess
from ctypes.util import find_library
from typing import Any

import pytest
from comfy_server import ComfyClient
from pack_import import ROOT

SCRIPTS = ROOT / "tests" / "browser"
SCREENSHOTS = ROOT / "output" / "browser"

needs_browser = pytest.mark.skipif(
    not (shutil.which("node") and shutil.which("npm") and find_library("nss3")),
    reason="Requires: node, npm and libnss3",
)


def run_script(client: ComfyClient, script: str, *arguments: str, seconds: float) -> dict[str, Any]:
    """Run a script with the server's address and the folder of screenshots; return its report."""
    if not (SCRIPTS / "node_modules").is_dir():
        pytest.fail("tests/browser/node_modules is absent: run 'make browser' or 'make npm'")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    # otherwise the first start opens the template browser over the graph
    client.post("/settings", {"Comfy.TutorialCompleted": True})
    done = subprocess.run(
        [shutil.which("node") or "node", script, client.url, str(SCREENSHOTS), *arguments],
        cwd=SCRIPTS,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout))
