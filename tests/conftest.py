"""Make the repository importable as `flux_fp4` and watch over skipped tests."""

from __future__ import annotations

import pytest
from pack_import import register_pack
from skip_guard import SkipGuard

register_pack()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SkipGuard(), "skip-guard")
