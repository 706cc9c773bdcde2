"""Sets of pictures that belong together: the same prompts and seeds, drawn by several models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..errors.quality import PicturesError, PromptsError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Pictures(Protocol):
    """One model's pictures.

    Attributes:
        name: Of the model or its folder.
        labels: A name for each picture.
    """

    @property
    def name(self) -> str:
        """See above."""

    @property
    def labels(self) -> Sequence[str]:
        """See above."""

    def __len__(self) -> int:
        """Return the number of pictures."""

    def __getitem__(self, index: int) -> Tensor:
        """Return one picture, ``[3, height, width]`` in uint8."""


class FolderPictures:
    """The picture files of a folder, by name; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.name, self._folder = folder.name, folder
        self.labels: Sequence[str] = _picture_names(folder)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tensor:
        path = self._folder / self.labels[index]
        try:
            with Image.open(path) as picture:
                pixels = np.array(picture.convert("RGB"))
        except UnidentifiedImageError as error:
            raise PicturesError(
                f"'{path}' is no picture that Pillow can read",
                "PNG, JPEG and WebP are",
                "Remove it.",
            ) from error
        return torch.from_numpy(pixels).permute(2, 0, 1)


class BatchPictures:
    """A batch ``[n, height, width, 3]`` of floats from 0 to 1, as ComfyUI's IMAGE.

    Values are cut to 8 bits in the way ComfyUI saves them (0.30, ``SaveImage``), so the numbers are
    those of the saved files.
    """

    def __init__(self, name: str, batch: Tensor) -> None:
        self.name, self._batch = name, batch
        self.labels: Sequence[str] = [str(number) for number in range(1, len(batch) + 1)]

    def __len__(self) -> int:
        return len(self._batch)

    def __getitem__(self, index: int) -> Tensor:
        picture = self._batch[index, ..., :3].float().cpu()
        return (picture * 255).clamp(0, 255).byte().permute(2, 0, 1)


def paired_folders(folders: Sequence[Path]) -> list[FolderPictures]:
    """Return the pictures of folders that hold files of the same names.

    Raises:
        PicturesError: A folder is missing or empty, or a name has no partner.
    """
    first, *others = sets = [FolderPictures(folder) for folder in folders]
    for folder, other in zip(folders[1:], others, strict=True):
        alone = sorted(set(first.labels) ^ set(other.labels))
        if alone:
            raise PicturesError(
                f"{len(alone)} pictures are in only one of '{folders[0]}' and '{folder}', first "
                f"'{alone[0]}'",
                "pictures are compared by equal file names",
                "Save both models' pictures of a prompt and seed under the same name.",
            )
    return _named_apart(sets, folders)


def read_prompts(file: Path, labels: Sequence[str]) -> list[str]:
    """Read the prompts of pictures: lines in the order of the names, or JSON from name to prompt.

    Raises:
        PromptsError: A picture has none.
    """
    text = file.read_text(encoding="utf-8")
    if file.suffix.lower() != ".json":
        return prompts_in_lines(text, len(labels))
    try:
        by_name = json.loads(text)
    except json.JSONDecodeError:
        by_name = None
    if not isinstance(by_name, dict):
        raise PromptsError(f"'{file}' holds no JSON object", "a .json maps file name to prompt")
    missing = [label for label in labels if not isinstance(by_name.get(label), str)]
    if missing:
        raise PromptsError(
            f"'{file}' has no prompt for {len(missing)} pictures, the first is '{missing[0]}'",
            "every picture needs one",
        )
    return [by_name[label] for label in labels]


def prompts_in_lines(text: str, count: int) -> list[str]:
    """Return one prompt per line; blank lines do not count.

    Raises:
        PromptsError: There are not as many as pictures.
    """
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if len(prompts) != count:
        raise PromptsError(
            f"There are {len(prompts)} prompts for {count} pictures", "every picture needs one"
        )
    return prompts


def check_counts(sets: Sequence[Pictures]) -> None:
    """Check that sets pair up.

    Raises:
        PicturesError: They are empty, or not equally large.
    """
    counts = [len(pictures) for pictures in sets]
    if len(set(counts)) != 1 or counts[0] == 0:
        raise PicturesError(
            f"The sets have {' and '.join(map(str, counts))} pictures",
            "equally many are needed, at least one",
            "Draw the same prompts and seeds with both models.",
        )


def _picture_names(folder: Path) -> list[str]:
    names = []
    if folder.is_dir():
        names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES)
    if not names:
        raise PicturesError(
            f"'{folder}' is no folder with pictures",
            f"files that end in {', '.join(_SUFFIXES)} are compared",
            "Name a folder that holds one picture per prompt.",
        )
    return names


def _named_apart(sets: list[FolderPictures], folders: Sequence[Path]) -> list[FolderPictures]:
    """Give whole paths as names where folders are called the same."""
    if len({pictures.name for pictures in sets}) < len(sets):
        for pictures, folder in zip(sets, folders, strict=True):
            pictures.name = str(folder)
    return sets
