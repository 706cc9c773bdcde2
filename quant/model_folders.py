"""The layout of model folders, and which names may become paths below them.

    <root>/<name>/<name>.safetensors            quantized checkpoint
    <root>/<name>/double_blocks.0.onnx          its ONNX export
    <root>/<name>/<target>/manifest.json        an engine, named "<name>/<target>"
    <root>/recipes/<name>.yaml                  a recipe of the user's own
    <root>/samples/<name>.samples.safetensors   calibration samples for the command line
    <root>/.statistics/<digests>/               what calibration measured, for every recipe
    <root>/.durations/<machine>.json            how long the stages took on a machine
    <root>/.training/                           trajectories, logs and unfinished distillations

Symbolic links that a user put there are followed, as ComfyUI's own loaders do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.json"
RECIPES = "recipes"
SAMPLES = "samples"
STATISTICS = ".statistics"
DURATIONS = ".durations"
TRAINING = ".training"

_MAX_NAME = 100
# Windows refuses these characters and device names; a pack folder may be shared between systems.
# Half a surrogate pair is text that no file system stores.
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f-\x9f\ud800-\udfff]')
# https://learn.microsoft.com/windows/win32/fileio/naming-a-file, superscript digits included
_DEVICES = re.compile(
    r"(con|conin\$|conout\$|prn|aux|nul|(com|lpt)[\d¹²³]) *(\..*)?", re.IGNORECASE
)


@dataclass(frozen=True)
class ModelFolders:
    """Model folders that are searched in order; what is new goes into the first.

    Attributes:
        roots: The folders; they need not exist.
    """

    roots: Sequence[Path]

    def checkpoints(self) -> list[str]:
        """List the names of all quantized checkpoints."""
        return sorted({folder.name for folder in self.checkpoint_folders()})

    def exported(self) -> list[str]:
        """List the names of quantized checkpoints with an ONNX export beside them."""
        folders = self.checkpoint_folders()
        return sorted({folder.name for folder in folders if any(folder.glob("*_blocks.0.onnx"))})

    def engines(self) -> list[str]:
        """List the names of all engines, newest first."""
        found = {
            f"{folder.name}/{manifest.parent.name}": manifest.stat().st_mtime
            for folder in self.checkpoint_folders()
            for manifest in folder.glob(f"*/{MANIFEST}")
        }
        return sorted(found, key=lambda name: (-found[name], name))

    def checkpoint(self, name: str) -> Path | None:
        """Return the file of an existing quantized checkpoint; None for any other name."""
        if name_fault(name) is None:
            for root in self.roots:
                if holds_checkpoint(root / name):
                    return checkpoint_file(root / name)
        return None

    def new_checkpoint(self, name: str) -> Path:
        """Return the file that a quantized checkpoint has or will have.

        Args:
            name: Without a fault, see ``name_fault``.
        """
        return self.checkpoint(name) or checkpoint_file(self.roots[0] / name)

    def engine(self, name: str) -> Path | None:
        """Return the folder of an existing engine ``<checkpoint>/<target>``; None if none is."""
        checkpoint, _, target = name.partition("/")
        if name_fault(checkpoint) is None and name_fault(target) is None:
            for root in self.roots:
                folder = root / checkpoint / target
                if (folder / MANIFEST).is_file():
                    return folder
        return None

    def recipe(self, name: str) -> Path | None:
        """Return the file of a recipe of the user's own; None if there is none of that name."""
        if name_fault(name) is None:
            for root in self.roots:
                path = root / RECIPES / f"{name}.yaml"
                if path.is_file():
                    return path
        return None

    def samples(self, name: str) -> Path:
        """Return where calibration samples are or will be saved.

        Args:
            name: Without a fault, see ``name_fault``.
        """
        # the suffix keeps "samples/samples.safetensors" from looking like a quantized checkpoint
        return self.roots[0] / SAMPLES / f"{name}.samples.safetensors"

    @property
    def statistics(self) -> Path:
        """Folder of calibration statistics, which all quantized checkpoints share."""
        return self.roots[0] / STATISTICS

    @property
    def durations(self) -> Path:
        """Folder of how long the stages took, one file per machine."""
        return self.roots[0] / DURATIONS

    @property
    def training(self) -> Path:
        """Folder of trajectories, and of logs and states of distillations by name."""
        return self.roots[0] / TRAINING

    def checkpoint_folders(self) -> Iterator[Path]:
        """Yield every folder that holds a quantized checkpoint."""
        for root in self.roots:
            if root.is_dir():
                yield from (folder for folder in root.iterdir() if holds_checkpoint(folder))


def checkpoint_file(folder: Path) -> Path:
    """Return where the quantized checkpoint of a folder lies."""
    return folder / f"{folder.name}.safetensors"


def holds_checkpoint(folder: Path) -> bool:
    """Tell whether a folder holds a quantized checkpoint; the file is not opened."""
    return checkpoint_file(folder).is_file()


def name_fault(name: str) -> str | None:
    """Say why `name` cannot be a folder name on every system, or None if it can."""
    if not name or name != name.strip() or name.endswith("."):
        return "it is empty, or starts or ends with a space or a dot"
    if name.startswith("."):
        return "it starts with a dot, which hides the folder"
    size = len(name.encode("utf-8", "surrogatepass"))
    if size > _MAX_NAME:
        return f"it has {size} bytes, the limit is {_MAX_NAME}"
    if (found := _FORBIDDEN.search(name)) is not None:
        return f"{found[0]!r} is not allowed in it"
    if _DEVICES.fullmatch(name):
        return "Windows reserves it for a device"
    return None
