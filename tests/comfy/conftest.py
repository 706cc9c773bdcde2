"""A real ComfyUI server for the whole test session, with the pack and the small model in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_server import ComfyClient, ComfyServer
from small_model_files import ROOT, link_models


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """Return the ComfyUI tree; there is no test in this folder that could do without it."""
    path = Path(os.environ.get("COMFYUI_PATH", ROOT / ".comfyui"))
    if not (path / "main.py").is_file():
        pytest.fail(f"'{path}' is not a ComfyUI tree: run 'make comfyui' or set COMFYUI_PATH")
    return path


@pytest.fixture(scope="session")
def server(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A running server; `server.base` is its base folder, `server.log()` what it printed."""
    base = tmp_path_factory.mktemp("comfyui")
    link_models(base)
    server = ComfyServer(comfyui_path, base, ROOT)
    with server:
        yield server


@pytest.fixture(scope="session")
def object_info(server: ComfyServer) -> dict[str, Any]:
    """Node definitions of the fresh server, before any test adds files to its model folders."""
    return server.client.object_info()


@pytest.fixture(scope="session")
def client(server: ComfyServer, object_info: dict[str, Any]) -> ComfyClient:
    return server.client
