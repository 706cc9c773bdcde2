"""Pictures of folders and batches, and the prompts that belong to them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from flux_fp4.quant.errors.quality import PicturesError, PromptsError
from flux_fp4.quant.quality.pictures import (
    BatchPictures,
    FolderPictures,
    paired_folders,
    prompts_in_lines,
    read_prompts,
)
from PIL import Image


def folder(path: Path, *names: str) -> Path:
    path.mkdir(parents=True)
    for index, name in enumerate(names):
        Image.fromarray(np.full((4, 6, 3), index * 10, np.uint8)).save(path / name)
    return path


def test_files_are_read_by_name(tmp_path: Path) -> None:
    pictures = FolderPictures(folder(tmp_path / "a", "0.png", "1.png"))
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    assert (pictures.name, list(pictures.labels)) == ("a", ["0.png", "1.png"])
    assert pictures[1].shape == (3, 4, 6)
    assert pictures[1].unique().tolist() == [10]


def test_batch_is_cut_to_8_bits_as_comfyui_saves() -> None:
    values = torch.tensor([0.0, 0.5, 0.999, 1.2]).view(1, 1, 4, 1)
    pictures = BatchPictures("a", values.expand(1, 1, 4, 3))
    assert pictures[0][0, 0].tolist() == [0, 127, 254, 255]


def test_names_without_partner_are_refused(tmp_path: Path) -> None:
    first, second = folder(tmp_path / "a", "0.png", "1.png"), folder(tmp_path / "b", "0.png")
    with pytest.raises(PicturesError, match=r"1 pictures .* first '1.png'"):
        paired_folders([first, second])


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [folder(tmp_path / "x" / "out", "0.png"), folder(tmp_path / "y" / "out", "0.png")]
    assert [pictures.name for pictures in paired_folders(folders)] == [str(p) for p in folders]


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PicturesError, match="no folder with pictures"):
        FolderPictures(tmp_path)


def test_file_that_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"not a picture")
    with pytest.raises(PicturesError, match="no picture that Pillow can read"):
        FolderPictures(tmp_path)[0]


def test_prompts_are_lines_or_names(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n\na dog\n")
    assert read_prompts(tmp_path / "p.txt", ["0.png", "1.png"]) == ["a cat", "a dog"]
    (tmp_path / "p.json").write_text(json.dumps({"1.png": "a dog", "0.png": "a cat"}))
    assert read_prompts(tmp_path / "p.json", ["0.png", "1.png"]) == ["a cat", "a dog"]


def test_prompts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptsError, match="1 prompts for 2 pictures"):
        prompts_in_lines("a cat", 2)
    (tmp_path / "p.json").write_text('{"0.png": "a cat"}')
    with pytest.raises(PromptsError, match=r"first is '1.png'"):
        read_prompts(tmp_path / "p.json", ["0.png", "1.png"])
    (tmp_path / "p.json").write_text("[1, 2")
    with pytest.raises(PromptsError, match="no JSON object"):
        read_prompts(tmp_path / "p.json", ["0.png"])
    (tmp_path / "p.json").write_text("[1, 2]")
    with pytest.raises(PromptsError, match="no JSON object"):
        read_prompts(tmp_path / "p.json", ["0.png"])
