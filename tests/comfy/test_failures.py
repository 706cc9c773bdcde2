"""What Python raises in a node reaches the user as an error of the pack, with a next step."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_in_process import import_comfyui

import_comfyui()

from flux_fp4.nodes import FluxFP4Extension  # noqa: E402
from flux_fp4.nodes.errors import FileAccessError, PackageMissingError  # noqa: E402
from flux_fp4.nodes.failures import told  # noqa: E402
from flux_fp4.quant.errors.recipes import RecipeError  # noqa: E402


def test_every_node_tells_its_failures() -> None:
    nodes = asyncio.run(FluxFP4Extension().get_node_list())
    assert [node for node in nodes if not hasattr(node.execute, "__wrapped__")] == []


def test_missing_package_is_named() -> None:
    @told
    def execute() -> Any:
        import package_that_nobody_has  # noqa: F401

    with pytest.raises(PackageMissingError, match=r"requirements\.txt") as caught:
        execute()
    assert caught.value.package == "package_that_nobody_has"


def test_refused_file_is_named(tmp_path: Path) -> None:
    @told
    def execute(file: Path) -> Any:
        file.read_bytes()

    with pytest.raises(FileAccessError, match="queue again") as caught:
        execute(tmp_path / "absent")
    assert caught.value.file == str(tmp_path / "absent")
    assert caught.value.reason == "No such file or directory"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RecipeError("x", "y")])
def test_what_has_advice_of_its_own_passes(error: Exception) -> None:
    @told
    def execute() -> Any:
        raise error

    with pytest.raises(type(error)) as caught:
        execute()
    assert caught.value is error


def test_errors_have_a_short_name_for_the_errors_panel() -> None:
    """Inside ComfyUI the name of a pack's module is a path."""
    for kind in (FileAccessError, RecipeError):
        assert kind.__module__ == "flux_fp4"
