"""Register the repository as `flux_fp4`, watch over skipped tests, boot ComfyUI on demand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from comfy_server import ComfyClient, ComfyServer
from hypothesis import HealthCheck, Phase, settings
from pack_import import ROOT, register_pack
from skip_guard import SkipGuard
from small_model_files import link_models

register_pack()

# An example takes milliseconds, the first one imports; the deadline is for a busy machine and still
# tells a hang.
_COMMON: dict[str, Any] = {
    "phases": [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    "deadline": timedelta(seconds=60),
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("bounded", max_examples=50, derandomize=True, **_COMMON)
settings.register_profile("fuzz", max_examples=2000, print_blob=True, **_COMMON)
settings.load_profile("bounded")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SkipGuard(), "skip-guard")


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """Return the ComfyUI tree; a test that asks for it cannot do without."""
    path = Path(os.environ.get("COMFYUI_PATH", ROOT / ".comfyui"))
    if not (path / "main.py").is_file():
        pytest.fail(f"'{path}' is not a ComfyUI tree: run 'make setup' or set COMFYUI_PATH")
    return path


@pytest.fixture(scope="session")
def server(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A running server; `server.base` is its base folder, `server.log()` what it printed."""
    base = tmp_path_factory.mktemp("comfyui")
    link_models(base)
    with ComfyServer(comfyui_path, base, ROOT) as server:
        yield server


@pytest.fixture(scope="session")
def object_info(server: ComfyServer) -> dict[str, Any]:
    """Node definitions of the fresh server, before any test adds files to its model folders."""
    return server.client.object_info()


@pytest.fixture(scope="session")
def client(server: ComfyServer, object_info: dict[str, Any]) -> ComfyClient:
    return server.client
