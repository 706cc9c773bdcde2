"""The file that the Registry hands out: valid, whole, and working in a clean ComfyUI."""

from __future__ import annotations

import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_workflow import ApiWorkflow, nodes_of_type
from comfy_cli import comfy, run
from comfy_server import ComfyServer
from pack_import import ROOT
from packaging.requirements import Requirement
from pipeline_runs import FULL_PIPELINE, picture, shipped
from small_model_files import link_models
from small_workflow import write_calibration_pictures

PACK_NAME = "comfyui-flux-fp4"
"""The Registry's id of the pack, which is the name of its folder after installation."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Path:
    """A repository of its own with every file that belongs to this one; packing writes into it."""
    folder = tmp_path_factory.mktemp("checkout")
    command = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    listed = run(*command, folder=ROOT, home=home)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    run("git", "init", "--quiet", folder=folder, home=home)
    run("git", "add", "--all", folder=folder, home=home)
    return folder


@pytest.fixture(scope="module")
def installed(checkout: Path, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder of ComfyUI with nothing but the packed file, unpacked as the Manager does."""
    comfy("node", "pack", folder=checkout, home=home)
    base = tmp_path_factory.mktemp("base")
    with zipfile.ZipFile(checkout / "node.zip") as archive:
        archive.extractall(base / "custom_nodes" / PACK_NAME)
    return base


@pytest.fixture(scope="module")
def server(installed: Path, comfyui_path: Path) -> Iterator[ComfyServer]:
    link_models(installed)
    with ComfyServer(comfyui_path, installed, installed / "custom_nodes" / PACK_NAME) as server:
        yield server


def test_registry_takes_it(checkout: Path, home: Path) -> None:
    said = comfy("node", "validate", folder=checkout, home=home)
    assert "passed" in said
    assert "warning" not in said.lower(), said


def test_what_users_need_is_in_it_and_nothing_else(installed: Path) -> None:
    pack = installed / "custom_nodes" / PACK_NAME
    found = {path.relative_to(pack).parts[0] for path in pack.rglob("*") if path.is_file()}
    assert found == {
        *(".comfyignore", ".gitignore", "CHANGELOG.md", "LICENSE", "README.md"),
        *("__init__.py", "__main__.py", "pyproject.toml", "requirements.txt"),
        *("cli", "locales", "nodes", "quant", "trt_runtime", "web", "workflows"),
    }
    for folder in ("locales", "web", "workflows"):
        shipped_files = {p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if p.is_file()}
        packed = {p.relative_to(pack) for p in (pack / folder).rglob("*") if p.is_file()}
        assert packed == shipped_files
    assert sum(path.stat().st_size for path in pack.rglob("*") if path.is_file()) < 5e6


def test_requirements_install_line_by_line(installed: Path, home: Path) -> None:
    """The Manager hands every line to pip by itself; here all of them are there already."""
    file = installed / "custom_nodes" / PACK_NAME / "requirements.txt"
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    assert lines
    for line in lines:
        assert Requirement(line).url is None
        arguments = ("pip", "install", "--dry-run", "--python", sys.executable, line)
        said = run(sys.executable, "-m", "uv", *arguments, folder=installed, home=home)
        assert "Would make no changes" in said, said


def test_packed_workflow_runs(installed: Path, server: ComfyServer) -> None:
    object_info: dict[str, Any] = server.client.object_info()
    write_calibration_pictures(installed / "input")
    workflow: ApiWorkflow = shipped(FULL_PIPELINE, object_info)
    assert nodes_of_type(workflow, "FluxFP4Quantize")
    assert picture(server.client, server.client.run(workflow, 600)).std() > 5
    name = next(iter(server.client.get("/workflow_templates")))
    assert name == PACK_NAME
