"""The `flux_fp4` folders of ComfyUI's extra_model_paths.yaml, read as ComfyUI reads them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from .errors import ModelsFolderError

EXTRA_PATHS = "extra_model_paths.yaml"
MODEL_FOLDER = "flux_fp4"


def model_roots(tree: Path) -> list[Path]:
    """Return the model folders of a ComfyUI tree, in the order of ComfyUI 0.30.

    Folders that ComfyUI takes from its own command line (`--base-directory`,
    `--extra-model-paths-config`) are not known here.

    Raises:
        ModelsFolderError: The file is not what ComfyUI takes.
    """
    roots: list[Path] = []
    default, path = tree / "models" / MODEL_FOLDER, tree / EXTRA_PATHS
    if not path.is_file():
        return [default]
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        for section in (entry for entry in sections.values() if entry):
            # ComfyUI's `utils/extra_config.py` and `folder_paths.add_model_folder_path`
            for folder in _folders(section, path.parent):
                if section.get("is_default"):
                    roots = [folder, *(root for root in roots if root != folder)]
                elif folder not in roots:
                    roots.append(folder)
    except (yaml.YAMLError, AttributeError, TypeError, UnicodeDecodeError) as error:
        raise ModelsFolderError(f"'{path}' cannot be read: {error}") from error
    # the pack adds its own folder when ComfyUI has read the file
    return roots if default in roots else [*roots, default]


def _folders(section: dict[str, Any], beside: Path) -> list[Path]:
    base = section.get("base_path")
    root = beside
    if base is not None:
        root = beside / os.path.expandvars(os.path.expanduser(base))  # as ComfyUI
    lines = section.get(MODEL_FOLDER, "").split("\n")
    return [Path(os.path.normpath(root / line)) for line in lines if line]
