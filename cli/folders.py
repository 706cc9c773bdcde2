"""Where commands look for models, and which of their arguments may become paths there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..quant.model_folders import ModelFolders, name_fault
from .errors import ModelsFolderError, NameRefusedError, NotFoundError

if TYPE_CHECKING:
    from ..trt_runtime.run_history import RunHistory

PACK = Path(__file__).absolute().parents[1]


def comfyui_tree() -> Path | None:
    """Return the ComfyUI tree that the pack lies in, if it does."""
    # not resolved: the pack may be a link in custom_nodes
    tree = PACK.parents[1]
    inside = PACK.parent.name == "custom_nodes" and (tree / "folder_paths.py").is_file()
    return tree if inside else None


def model_folders(models: Sequence[Path] | None) -> ModelFolders:
    """Return the folders that the user named, or those of the ComfyUI tree around the pack.

    Raises:
        ModelsFolderError: There is none.
    """
    if models is None:
        from .extra_paths import model_roots

        tree = comfyui_tree()
        if tree is None:
            raise ModelsFolderError("The pack does not lie in custom_nodes of a ComfyUI tree")
        return ModelFolders([root.absolute() for root in model_roots(tree)])
    for folder in models:
        if not folder.is_dir():
            raise ModelsFolderError(f"'{folder}' is no folder")
    return ModelFolders([folder.absolute() for folder in models])


def run_history(folders: ModelFolders) -> RunHistory:
    """Return how long the stages took on this machine."""
    from ..trt_runtime.backend import probe_gpu
    from ..trt_runtime.run_history import RunHistory, machine_identity

    return RunHistory(folders.durations, machine_identity(probe_gpu().name))


def existing_checkpoint(folders: ModelFolders, name: str) -> Path:
    """Return the file of a quantized checkpoint.

    Raises:
        NotFoundError: There is none of that name.
    """
    path = folders.checkpoint(name)
    if path is None:
        step = "The command `list` shows what there is; `quantize` makes one."
        raise NotFoundError("quantized checkpoint", name, folders.roots, step)
    return path


def new_checkpoint(folders: ModelFolders, name: str) -> Path:
    """Return the file that a quantized checkpoint has or will have.

    Raises:
        NameRefusedError: It is no plain folder name.
    """
    fault = name_fault(name)
    if fault is not None:
        raise NameRefusedError(name, fault)
    return folders.new_checkpoint(name)


def existing_engine(folders: ModelFolders, name: str) -> Path:
    """Return the folder of an engine.

    Raises:
        NotFoundError: There is none of that name.
    """
    folder = folders.engine(name)
    if folder is None:
        step = "Engines are named CHECKPOINT/TARGET; `list` shows them, `build` makes one."
        raise NotFoundError("engine", name, folders.roots, step)
    return folder
