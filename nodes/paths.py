"""Where the pack's files live in ComfyUI, and which names from a workflow may become paths.

    models/flux_fp4/                             see ``quant.model_folders``
    models/diffusion_models/<name>.safetensors   a checkpoint saved for ComfyUI's own loader

A link can carry any string, so every name is checked before it touches the disk: one plain
folder name per level, below a registered model folder. A workflow cannot create symbolic links.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths

from ..quant.model_folders import MANIFEST, RECIPES, ModelFolders, checkpoint_file, name_fault
from .errors import ArtifactNameError, ArtifactNotFoundError, SourceCheckpointError

__all__ = ["MANIFEST", "name_fault"]

MODEL_FOLDER = "flux_fp4"
_SOURCES = "diffusion_models"

_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")


def register_model_folder() -> None:
    """Add ``models/flux_fp4`` to ComfyUI's model folders and those of extra_model_paths.yaml."""
    default = os.path.join(folder_paths.models_dir, MODEL_FOLDER)
    folder_paths.add_model_folder_path(MODEL_FOLDER, default)
    # A new key starts with an empty extension set, which ComfyUI 0.30 reads as "every file".
    paths, _ = folder_paths.folder_names_and_paths[MODEL_FOLDER]
    folder_paths.folder_names_and_paths[MODEL_FOLDER] = (paths, {".safetensors"})


def source_checkpoints() -> list[str]:
    """List the safetensors files of ComfyUI's `diffusion_models` folders.

    Shards are listed as one: by the index beside them, `<repo>/transformer/
    diffusion_pytorch_model.safetensors.index.json`. Checkpoints of ComfyUI's `checkpoints` folders
    are not listed: only their headers tell which hold a FLUX, and 'Load Checkpoint' gives a MODEL.
    """
    names = folder_paths.get_filename_list(_SOURCES)
    return sorted({_index(name) or name for name in names if name.endswith(".safetensors")})


def source_checkpoint(name: str) -> Path:
    """Return the path of a file listed by `source_checkpoints`."""
    path = folder_paths.get_full_path(_SOURCES, name)
    if path is None or name not in source_checkpoints():
        raise SourceCheckpointError(name)
    return Path(path)


def source_files(name: str) -> list[Path]:
    """Return every file of a checkpoint listed by `source_checkpoints`: shards follow their index.

    Raises:
        SourceCheckpointError: It is not listed.
        DamagedCheckpointError: Its index is none, or a shard is missing.
    """
    from ..quant.sources.shard_index import INDEX_SUFFIX, read_index

    path = source_checkpoint(name)
    if not name.endswith(INDEX_SUFFIX):
        return [path]
    return [path, *(path.with_name(shard) for shard in sorted(set(read_index(path).values())))]


def user_recipes() -> list[str]:
    """List the names of the user's own recipes, ``recipes/<name>.yaml`` in the model folder."""
    roots = model_folders().roots
    return sorted({path.stem for root in roots for path in (root / RECIPES).glob("*.yaml")})


def user_recipe(name: str) -> Path:
    """Return the file of a recipe listed by `user_recipes`.

    Raises:
        ArtifactNotFoundError: There is none of that name, or the name is not a plain one.
    """
    path = model_folders().recipe(name)
    if path is None:
        raise ArtifactNotFoundError(
            "recipe", name, "Choose another one in 'recipe', or press R to refresh the lists."
        )
    return path


def statistics_folder() -> Path:
    """Return the folder of calibration statistics, which all quantized checkpoints share."""
    return model_folders().statistics


def durations_folder() -> Path:
    """Return the folder that tells how long the stages took on each machine."""
    return model_folders().durations


def quantized_checkpoints() -> list[str]:
    """List the names of all quantized checkpoints."""
    return model_folders().checkpoints()


def exported_checkpoints() -> list[str]:
    """List the names of quantized checkpoints with an ONNX export beside them."""
    return model_folders().exported()


def engines() -> list[str]:
    """List the names of all engines, newest first."""
    return model_folders().engines()


def quantized_checkpoint(name: str) -> Path:
    """Return the file of an existing quantized checkpoint.

    Raises:
        ArtifactNotFoundError: There is none of that name, or the name is not a plain one.
    """
    path = model_folders().checkpoint(name)
    if path is None:
        raise ArtifactNotFoundError(
            "quantized checkpoint",
            name,
            "Make it with 'Quantize FLUX to FP4' or choose another one.",
        )
    return path


def new_checkpoint(name: str) -> Path:
    """Return the file that a quantized checkpoint of that name has or will have.

    Raises:
        ArtifactNameError: The name is not a plain folder name.
    """
    fault = name_fault(name)
    if fault is not None:
        raise ArtifactNameError(name, fault)
    return model_folders().new_checkpoint(name)


def name_verdict(name: str | None, node: str) -> bool | str:
    """Return what a node's `validate_inputs` answers about a name: True, or what is wrong with it.

    Args:
        name: What was entered; None while it comes through a link: then it is checked in the run.
        node: Display name of the node.
    """
    fault = None if name is None else name_fault(name)
    return True if name is None or fault is None else str(ArtifactNameError(name, fault, node))


def samples_file(name: str) -> Path:
    """Return the file in which calibration samples are or will be saved.

    Raises:
        ArtifactNameError: The name is not a plain one.
    """
    fault = name_fault(name)
    if fault is not None:
        raise ArtifactNameError(name, fault, "FLUX Calibration Samples")
    return model_folders().samples(name)


def native_checkpoint(name: str) -> Path:
    """Return the file in ComfyUI's `diffusion_models` that a native checkpoint has or will have.

    Raises:
        ArtifactNameError: The name is not a plain one.
    """
    fault = name_fault(name)
    if fault is not None:
        raise ArtifactNameError(name, fault, "Save as ComfyUI NVFP4 Checkpoint")
    folders = [Path(path) for path in folder_paths.get_folder_paths(_SOURCES)]
    # the first of ComfyUI's own two is models/unet, its former name
    folders.sort(key=lambda folder: folder.name != _SOURCES)
    file = f"{name}.safetensors"
    return next((folder for folder in folders if (folder / file).exists()), folders[0]) / file


def engine_folder(name: str) -> Path:
    """Return the folder of an existing engine ``<checkpoint>/<target>``.

    Raises:
        ArtifactNotFoundError: There is none of that name, or the name is not a plain one.
    """
    folder = model_folders().engine(name)
    if folder is None:
        raise ArtifactNotFoundError(
            "engine", name, "Make it with 'Build TensorRT Engine' or choose another one."
        )
    return folder


def engine_checkpoint(engine: Path) -> Path:
    """Return the quantized checkpoint that an engine folder belongs to."""
    return checkpoint_file(engine.parent)


def engine_name(engine: Path) -> str:
    """Return the name under which `engines` lists a folder."""
    return f"{engine.parent.name}/{engine.name}"


def model_folders() -> ModelFolders:
    return ModelFolders([Path(path) for path in folder_paths.get_folder_paths(MODEL_FOLDER)])


def _index(name: str) -> str | None:
    """Return the listed name of the index that a shard belongs to, if it lies beside the shard."""
    shard = _SHARD.fullmatch(name)
    path = folder_paths.get_full_path(_SOURCES, name) if shard else None
    if shard is None or path is None:
        return None
    index = f"{shard[1]}.safetensors.index.json"
    return index if Path(path).with_name(os.path.basename(index)).is_file() else None
