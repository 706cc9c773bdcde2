"""Where the pack's files live, and which names from a workflow may become paths.

    models/flux_fp4/<name>/<name>.safetensors       quantized checkpoint
    models/flux_fp4/<name>/double_blocks.0.onnx     its ONNX export
    models/flux_fp4/<name>/<target>/manifest.json   an engine, named "<name>/<target>"
    models/flux_fp4/recipes/<name>.yaml             a recipe of the user's own
    models/flux_fp4/.statistics/<digests>/          what calibration measured, for every recipe
    models/diffusion_models/<name>.safetensors      a checkpoint saved for ComfyUI's own loader

A link can carry any string, so every name is checked here before it touches the disk: one plain
folder name per level, below a registered model folder. Symbolic links that a user put there are
followed, as ComfyUI's own loaders do; a workflow cannot create any.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import folder_paths

from .errors import ArtifactNameError, ArtifactNotFoundError, SourceCheckpointError

MODEL_FOLDER = "flux_fp4"
MANIFEST = "manifest.json"
_SOURCES = "diffusion_models"
_RECIPES = "recipes"
_STATISTICS = ".statistics"

_MAX_NAME = 100
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")
# Windows refuses these characters and device names; a pack folder may be shared between systems.
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


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
    return sorted({path.stem for root in _roots() for path in (root / _RECIPES).glob("*.yaml")})


def user_recipe(name: str) -> Path:
    """Return the file of a recipe listed by `user_recipes`.

    Raises:
        ArtifactNotFoundError: There is none of that name, or the name is not a plain one.
    """
    for root in _roots():
        path = root / _RECIPES / f"{name}.yaml"
        if name_fault(name) is None and path.is_file():
            return path
    raise ArtifactNotFoundError("recipe", name, "Choose another one.")


def statistics_folder() -> Path:
    """Return the folder of calibration statistics, which all quantized checkpoints share."""
    return _roots()[0] / _STATISTICS


def quantized_checkpoints() -> list[str]:
    """List the names of all quantized checkpoints."""
    return sorted({folder.name for folder in _checkpoint_folders()})


def exported_checkpoints() -> list[str]:
    """List the names of quantized checkpoints with an ONNX export beside them."""
    folders = _checkpoint_folders()
    return sorted({folder.name for folder in folders if any(folder.glob("*_blocks.0.onnx"))})


def engines() -> list[str]:
    """List the names of all engines, newest first."""
    found = {
        f"{folder.name}/{manifest.parent.name}": manifest.stat().st_mtime
        for folder in _checkpoint_folders()
        for manifest in folder.glob(f"*/{MANIFEST}")
    }
    return sorted(found, key=lambda name: (-found[name], name))


def quantized_checkpoint(name: str) -> Path:
    """Return the file of an existing quantized checkpoint.

    Raises:
        ArtifactNotFoundError: There is none of that name, or the name is not a plain one.
    """
    for root in _roots():
        if name_fault(name) is None and _holds_checkpoint(root / name):
            return root / name / f"{name}.safetensors"
    raise ArtifactNotFoundError(
        "quantized checkpoint", name, "Make it with 'Quantize FLUX to FP4' or choose another one."
    )


def new_checkpoint(name: str) -> Path:
    """Return the file that a quantized checkpoint of that name has or will have.

    Raises:
        ArtifactNameError: The name is not a plain folder name.
    """
    fault = name_fault(name)
    if fault is not None:
        raise ArtifactNameError(name, fault)
    for root in _roots():
        if _holds_checkpoint(root / name):
            return root / name / f"{name}.safetensors"
    return _roots()[0] / name / f"{name}.safetensors"


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
    checkpoint, _, target = name.partition("/")
    for root in _roots():
        folder = root / checkpoint / target
        named = name_fault(checkpoint) is None and name_fault(target) is None
        if named and (folder / MANIFEST).is_file():
            return folder
    raise ArtifactNotFoundError(
        "engine", name, "Make it with 'Build TensorRT Engine' or choose another one."
    )


def engine_checkpoint(engine: Path) -> Path:
    """Return the quantized checkpoint that an engine folder belongs to."""
    return engine.parent / f"{engine.parent.name}.safetensors"


def engine_name(engine: Path) -> str:
    """Return the name under which `engines` lists a folder."""
    return f"{engine.parent.name}/{engine.name}"


def name_fault(name: str) -> str | None:
    """Say why `name` cannot be a folder name on every system, or None if it can."""
    if not name or name != name.strip() or name.endswith("."):
        return "it is empty, or starts or ends with a space or a dot"
    if name.startswith("."):
        return "it starts with a dot, which hides the folder"
    if len(name.encode()) > _MAX_NAME:
        return f"it has {len(name.encode())} bytes, the limit is {_MAX_NAME}"
    if (found := _FORBIDDEN.search(name)) is not None:
        return f"{found[0]!r} is not allowed in it"
    if _DEVICES.fullmatch(name):
        return "Windows reserves it for a device"
    return None


def _index(name: str) -> str | None:
    """Return the listed name of the index that a shard belongs to, if it lies beside the shard."""
    shard = _SHARD.fullmatch(name)
    path = folder_paths.get_full_path(_SOURCES, name) if shard else None
    if shard is None or path is None:
        return None
    index = f"{shard[1]}.safetensors.index.json"
    return index if Path(path).with_name(os.path.basename(index)).is_file() else None


def _roots() -> list[Path]:
    return [Path(path) for path in folder_paths.get_folder_paths(MODEL_FOLDER)]


def _checkpoint_folders() -> Iterator[Path]:
    for root in _roots():
        if root.is_dir():
            yield from (folder for folder in root.iterdir() if _holds_checkpoint(folder))


def _holds_checkpoint(folder: Path) -> bool:
    return (folder / f"{folder.name}.safetensors").is_file()
