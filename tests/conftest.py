"""Make the repository importable as `flux_fp4` and watch over skipped tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from skip_guard import SkipGuard

ROOT = Path(__file__).resolve().parent.parent


def register_package(name: str = "flux_fp4", root: Path = ROOT) -> None:
    """Import the repository under `name`, whatever its folder is called and without an install."""
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        name, root / "__init__.py", submodule_search_locations=[str(root)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


register_package()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SkipGuard(), "skip-guard")
