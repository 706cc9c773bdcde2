"""Calibration samples come back from a file as they were, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flux_fp4.quant.calibration import CalibrationSet
from flux_fp4.quant.calibration_files import load_samples, save_samples
from flux_fp4.quant.errors.calibration import CalibrationFileError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_flux import TINY_VARIANTS, random_samples

KEY = "flux_fp4_samples"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "samples" / "mine.samples.safetensors"
    save_samples(random_samples(), path)
    return path


def with_references(samples: CalibrationSet) -> CalibrationSet:
    extra = {"references": (torch.randn(1, 16, 4, 6),), "reference_method": "offset"}
    changed = tuple(
        replace(sample, conditioning=replace(sample.conditioning, **extra))
        for sample in samples.samples
    )
    return replace(samples, samples=changed)


def rewrite(
    path: Path, numbers: Callable[[dict[str, Any]], None] | None = None, **tensors: Any
) -> None:
    with safe_open(path, framework="pt") as file:
        fields = json.loads(file.metadata()[KEY])
    if numbers:
        numbers(fields)
    save_file({**load_file(path), **tensors}, path, {KEY: json.dumps(fields)})


@pytest.mark.parametrize("variant", TINY_VARIANTS)
def test_samples_come_back_with_the_same_digest(tmp_path: Path, variant: str) -> None:
    samples = random_samples(TINY_VARIANTS[variant])
    path = tmp_path / "a.safetensors"
    save_samples(samples, path)
    found = load_samples(path)
    assert found.digest() == samples.digest()
    assert (found.seed, found.timesteps) == (samples.seed, samples.timesteps)
    assert [sample.t for sample in found.samples] == [sample.t for sample in samples.samples]
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_references_and_types_come_back(tmp_path: Path) -> None:
    samples = with_references(random_samples())
    condition = samples.samples[0].conditioning
    half = replace(condition, context=condition.context.bfloat16(), guidance=None, pooled=None)
    samples = replace(samples, samples=(replace(samples.samples[0], conditioning=half),))
    save_samples(samples, tmp_path / "a.safetensors")
    found = load_samples(tmp_path / "a.safetensors").samples[0].conditioning
    assert found.context.dtype == torch.bfloat16
    assert (found.guidance, found.pooled, found.reference_method) == (None, None, "offset")
    assert torch.equal(found.references[0], half.references[0])


def test_a_prompt_is_stored_once(saved: Path) -> None:
    names = load_file(saved)
    assert sum(name.endswith(".context") for name in names) == 2
    assert sum(name.endswith(".latent") for name in names) == 4


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], None] | None, dict[str, Any], str]] = {
    "version": (lambda n: n.update(format_version=2), {}, "format_version"),
    "unknown field": (lambda n: n.update(extra=1), {}, "extra"),
    "no samples": (lambda n: n.update(samples=[]), {}, "samples"),
    "time": (lambda n: n["samples"][0].update(t=1.5), {}, "samples.0.t"),
    "conditioning": (lambda n: n["samples"][0].update(conditioning=9), {}, "not in the file"),
    "more samples": (lambda n: n["samples"].append(n["samples"][0]), {}, "lacks 'sample.4.latent'"),
    "seed digest": (lambda n: n.update(digest="0" * 64), {}, "not what its header says"),
    "references": (lambda n: n["conditioning"][0].update(references=65), {}, "references"),
    "shape": (None, {"sample.0.latent": torch.zeros(16, 6, 8)}, "'sample.0.latent' is F32"),
    "type": (
        None,
        {"sample.0.latent": torch.zeros(1, 16, 6, 8, dtype=torch.int32)},
        "'sample.0.latent' is I32",
    ),
    "NaN": (None, {"sample.0.latent": torch.full((1, 16, 6, 8), torch.nan)}, "NaN"),
    "changed": (None, {"sample.0.latent": torch.zeros(1, 16, 6, 8)}, "not what its header says"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_changed_file_is_refused(saved: Path, fault: str) -> None:
    numbers, tensors, text = FAULTS[fault]
    rewrite(saved, numbers, **tensors)
    with pytest.raises(CalibrationFileError) as caught:
        load_samples(saved)
    assert text in caught.value.reason
    assert "FLUX Calibration Samples" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 8])
def test_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CalibrationFileError, match="cannot be read"):
        load_samples(path)


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CalibrationFileError, match="no 'flux_fp4_samples' entry"):
        load_samples(tmp_path / "a.safetensors")


def test_an_absent_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(CalibrationFileError, match="cannot be read"):
        load_samples(tmp_path / "a.safetensors")
