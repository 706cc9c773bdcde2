"""Recipes, calibration samples and statistics with anything changed."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flux_fp4.quant.calibration_files import load_samples, save_samples
from flux_fp4.quant.errors.calibration import CalibrationFileError
from flux_fp4.quant.errors.recipes import RecipeError
from flux_fp4.quant.recipe import RECIPES, Recipe, read_recipe
from flux_fp4.quant.statistics_files import StatisticsFolder
from hypothesis import given
from hypothesis import strategies as st
from mutations import changed_json, damaged_bytes
from quantize_tiny import quantize
from safetensors.torch import load
from tiny_flux import random_flux, random_samples, save_flux

pytestmark = pytest.mark.usefixtures("bounded_memory")

FULL_RECIPE = {
    "name": "mine",
    "summary": "Mine.",
    "linears": "nvfp4",
    "overrides": [{"linears": ["*.img_mlp.*", "*.linear2"], "format": "fp8"}],
    "scale_search": "mse",
    "smoothing": "awq",
    "low_rank": {"rank": 32, "method": "full", "refinements": 1},
    "auto": {"floor_db": 20.0, "max_bytes": 10**9},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


def read_without_surprise(path: Path) -> Recipe | None:
    try:
        recipe = read_recipe(path)
    except RecipeError as error:
        refusal = str(error)
    else:
        assert recipe.name == path.stem
        assert recipe.format_of("double_blocks.0.img_mlp.0") in ("nvfp4", "fp8", "bf16")
        return recipe
    assert len(refusal) < 2000
    return None


@given(changed=changed_json(FULL_RECIPE), flow=st.booleans())
def test_recipe_with_changed_values(folder: Path, changed: Any, flow: bool) -> None:
    path = folder / "mine.yaml"
    text = json.dumps(changed) if flow else yaml.safe_dump(changed)
    path.write_text(text, encoding="utf-8")
    read_without_surprise(path)


@given(content=damaged_bytes(yaml.safe_dump(FULL_RECIPE).encode()))
def test_recipe_with_damaged_bytes(folder: Path, content: bytes) -> None:
    path = folder / "mine.yaml"
    path.write_bytes(content)
    read_without_surprise(path)


YAML_WORDS = (
    "!!python/object/apply:os.system [x]",
    "!!bool x",
    "!!int x",
    "!!timestamp x",
    "!!binary ä",
    "!!set {a}",
    "2001-99-99",
    "0b_",
    "0x_",
    "1:99:99",
    "190:20:30.15",
    ".nan",
    "-.inf",
    "9" * 5000,
    "<<: 3",
    "<<: [[]]",
    "*a",
    "&a [*a]",
    "? [a]",
    "? {}",
    "|",
    ">",
    "%YAML 9.9",
    "---",
    "...",
    "@",
    "`",
    "\t",
    "[" * 300,
    "{" * 300,
    "- " * 300,
    "? " * 300,
)


@given(
    words=st.lists(
        st.sampled_from(YAML_WORDS) | st.sampled_from(("name: mine", "summary: s", "linears:")),
        max_size=6,
    ),
    separator=st.sampled_from(("\n", " ", ": ", ", ", "\n  ")),
)
def test_recipe_of_yaml_that_readers_stumble_over(
    folder: Path, words: list[str], separator: str
) -> None:
    path = folder / "mine.yaml"
    path.write_text(separator.join(words), encoding="utf-8")
    read_without_surprise(path)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{chr(ord(name) - 1)}'] * 9)}]\n" for name in "bcdefghij"
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "summary: 2001-99-99\n",
        "summary: 0b_\n",
        "summary: !!bool x\n",
        "summary: !!timestamp x\n",
        "linears: bf16\nlinears: nvfp4\n",
        "overrides: [" + "{linears: [a], format: fp8}," * 1000 + "]\n",
        "overrides: [{linears: [" + "a," * 5000 + "], format: fp8}]\n",
    ],
    ids=["bomb", "date", "binary", "bool", "timestamp", "twice", "overrides", "patterns"],
)
def test_recipes_that_were_accepted_or_broke_the_reader(folder: Path, text: str) -> None:
    path = folder / "mine.yaml"
    fields = {"name": "mine", "summary": "s", "linears": "nvfp4"}
    path.write_text("".join(f"{k}: {v}\n" for k, v in fields.items() if k not in text) + text)
    assert read_without_surprise(path) is None


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_the_pack_are_plain(name: str) -> None:
    from flux_fp4.quant import recipe

    assert read_recipe(Path(recipe.__file__).parent / "recipes" / f"{name}.yaml").name == name


@pytest.fixture(scope="module")
def samples(folder: Path) -> tuple[Path, bytes, str]:
    path = folder / "mine.samples.safetensors"
    calibration = random_samples()
    save_samples(calibration, path)
    return path, path.read_bytes(), calibration.digest()


def parts(file: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def joined(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def check_samples(path: Path, content: bytes, digest: str) -> None:
    path.write_bytes(content)
    try:
        found = load_samples(path)
    except CalibrationFileError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert found.digest() == digest
    assert len(refusal) < 2000


@given(data=st.data())
def test_samples_with_damaged_bytes(samples: tuple[Path, bytes, str], data: Any) -> None:
    path, valid, digest = samples
    check_samples(path, data.draw(damaged_bytes(valid)), digest)


@given(data=st.data())
def test_samples_with_changed_header(samples: tuple[Path, bytes, str], data: Any) -> None:
    path, valid, digest = samples
    header, tensors = parts(valid)
    check_samples(path, joined(data.draw(changed_json(header)), tensors), digest)


@given(data=st.data())
def test_samples_with_changed_numbers(samples: tuple[Path, bytes, str], data: Any) -> None:
    path, valid, digest = samples
    header, tensors = parts(valid)
    key = "flux_fp4_samples"
    numbers = data.draw(changed_json(json.loads(header["__metadata__"][key])))
    header["__metadata__"][key] = json.dumps(numbers)
    if isinstance(numbers, dict) and isinstance(numbers.get("digest"), str):
        digest = numbers["digest"]
    check_samples(path, joined(header, tensors), digest)


@pytest.fixture(scope="module")
def statistics(folder: Path) -> tuple[StatisticsFolder, Path, bytes]:
    source = save_flux(random_flux(), folder / "source.safetensors")
    quantize(source, folder / "q.safetensors", statistics=folder / "statistics")
    found = next((folder / "statistics").glob("*/single_blocks.0.safetensors"))
    header, _ = parts(found.read_bytes())
    stored = header["__metadata__"]
    reader = StatisticsFolder(folder / "statistics", stored["source"], stored["calibration"])
    assert reader.path == found.parent
    return reader, found, found.read_bytes()


@given(data=st.data())
def test_statistics(statistics: tuple[StatisticsFolder, Path, bytes], data: Any) -> None:
    reader, path, valid = statistics
    header, tensors = parts(valid)
    changed = changed_json(header).map(lambda value: joined(value, tensors))
    start = valid[: len(valid) - len(tensors)]
    damaged = damaged_bytes(start).map(lambda head: head + tensors)
    path.write_bytes(data.draw(changed | damaged))
    found = reader.read("single_blocks.0")
    if found is not None:
        # what is read is mapped, so it is compared with a copy from memory
        expected = load(valid)
        for name, entry in found.linears.items():
            assert torch.equal(entry.mean_square, expected[f"linears.{name}.mean_square"])
            assert torch.equal(entry.range.quantiles, expected[f"linears.{name}.quantiles"])
        assert found.linears.keys() == {"linear1", "linear2"}
    assert reader.holds("single_blocks.0") in (True, False)


def test_flipped_bit_in_statistics_is_noticed(
    statistics: tuple[StatisticsFolder, Path, bytes],
) -> None:
    reader, path, valid = statistics
    path.write_bytes(valid[:-1] + bytes([valid[-1] ^ 1]))
    assert reader.read("single_blocks.0") is None


@given(content=st.binary(max_size=30) | st.sampled_from([b"nan", b"inf", b"1e999", b"9" * 9999]))
def test_velocity(statistics: tuple[StatisticsFolder, Path, bytes], content: bytes) -> None:
    reader, path, _ = statistics
    file = path.with_name("velocity_sqnr_db.txt")
    file.write_bytes(content)
    found = reader.velocity_sqnr_db()
    assert found is None or found == found
