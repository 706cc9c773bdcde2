"""Folders of extra_model_paths.yaml, in ComfyUI's own order."""

from __future__ import annotations

from pathlib import Path

import pytest
from flux_fp4.cli.errors import ModelsFolderError
from flux_fp4.cli.extra_paths import EXTRA_PATHS, model_roots

CASES = {
    "no file": (None, ["models/flux_fp4"]),
    "nothing in it": ("# comment\n", ["models/flux_fp4"]),
    "other models only": ("a:\n  loras: x\n", ["models/flux_fp4"]),
    "empty section": ("a:\n", ["models/flux_fp4"]),
    "beside the file": ("a:\n  flux_fp4: x\n", ["x", "models/flux_fp4"]),
    "several lines": ("a:\n  flux_fp4: |\n    x\n    y/z\n", ["x", "y/z", "models/flux_fp4"]),
    "relative base": ("a:\n  base_path: b\n  flux_fp4: x\n", ["b/x", "models/flux_fp4"]),
    "absolute": ("a:\n  base_path: b\n  flux_fp4: /disk/x\n", ["/disk/x", "models/flux_fp4"]),
    "default goes first": (
        "a:\n  flux_fp4: x\nb:\n  is_default: true\n  flux_fp4: y\n",
        ["y", "x", "models/flux_fp4"],
    ),
    "the same again as default": (
        "a:\n  flux_fp4: |\n    x\n    y\nb:\n  is_default: true\n  flux_fp4: y\n",
        ["y", "x", "models/flux_fp4"],
    ),
    "the pack's own": ("a:\n  flux_fp4: |\n    models/flux_fp4\n    x\n", ["models/flux_fp4", "x"]),
}


@pytest.mark.parametrize("case", CASES)
def test_folders_and_order(tmp_path: Path, case: str) -> None:
    text, expected = CASES[case]
    if text is not None:
        (tmp_path / EXTRA_PATHS).write_text(text)
    assert model_roots(tmp_path) == [tmp_path / folder for folder in expected]


def test_variables_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISK", str(tmp_path / "disk"))
    (tmp_path / EXTRA_PATHS).write_text("a:\n  base_path: $DISK\n  flux_fp4: x\n")
    assert model_roots(tmp_path)[0] == tmp_path / "disk" / "x"


@pytest.mark.parametrize("text", ["- a\n", "a: b\n", "a:\n  flux_fp4: [x]\n", "a: [\n"])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / EXTRA_PATHS).write_text(text)
    with pytest.raises(ModelsFolderError, match="extra_model_paths"):
        model_roots(tmp_path)
