"""A skip for a reason that is not on the list fails the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"
PLUGIN = """
from skip_guard import SkipGuard
def pytest_configure(config):
    config.pluginmanager.register(SkipGuard(), "skip-guard")
"""
MODULE_LEVEL = "import pytest\npytest.skip({!r}, allow_module_level=True)\n"
MARK = "import pytest\n@pytest.mark.skip(reason={!r})\ndef test_one(): pass\n"


@pytest.mark.parametrize("template", [MARK, MODULE_LEVEL], ids=["mark", "module"])
@pytest.mark.parametrize(
    ("reason", "code"),
    [("Requires: CUDA GPU SM >= 12.0", 0), ("later", 1)],
    ids=["allowed", "unknown"],
)
def test_run_fails_only_for_an_unknown_reason(
    tmp_path: Path, template: str, reason: str, code: int
) -> None:
    (tmp_path / "conftest.py").write_text(PLUGIN)
    (tmp_path / "test_sample.py").write_text(template.format(reason))
    (tmp_path / "test_other.py").write_text("def test_passes(): pass\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."],
        cwd=tmp_path,
        env={"PYTHONPATH": str(TOOLS), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout
    assert (f": {reason}" in done.stdout) == (code == 1)
