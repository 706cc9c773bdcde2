"""In which type the report is measured: what is written must not depend on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flux_fp4.quant.quantize import quantize_checkpoint
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from flux_fp4.quant.recipe import QuantizeOptions, named_recipe
from flux_fp4.quant.sources.source import open_source
from flux_fp4.quant.stack import compute_dtype, report_dtype
from tiny_flux import ignore_progress, random_samples

MOST_DB = 0.5
"""Largest change of a tiny block's SQNR, most of which comes from the few values that bf16 moves
across an FP4 edge: measured 0.16 dB here, 0.01 dB in blocks of FLUX.1-dev's width."""


@pytest.mark.parametrize("multiplies_bf16", [True, False])
def test_bf16_where_the_cpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, multiplies_bf16: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies_bf16)
    expected = torch.bfloat16 if multiplies_bf16 else compute_dtype("cpu")
    for recipe in ("nvfp4-max", "nvfp4-mse", "nvfp4-awq"):
        assert report_dtype("cpu", named_recipe(recipe)) is expected


@pytest.mark.parametrize(
    "recipe", ["auto", "fp8", "bf16", "nvfp4-fp8mix", "nvfp4-svdquant-r16", "nvfp4-qat"]
)
def test_what_is_finer_than_nvfp4_is_measured_as_it_is_calibrated(
    monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """In bf16, `auto` reported 24.0 dB of a block that it had measured above 25 dB."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert report_dtype("cpu", named_recipe(recipe)) is compute_dtype("cpu")


def test_report_in_bf16_changes_no_tensor_and_hardly_the_report(
    monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path
) -> None:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr("flux_fp4.quant.quantize.compute_dtype", lambda _device: torch.float32)
        monkeypatch.setattr(
            "flux_fp4.quant.quantize.report_dtype", lambda _device, _recipe, d=dtype: d
        )
        results.append(quantize(source, tmp_path / str(dtype)))
    in_fp32, in_bf16 = (result.metadata for result in results)
    assert in_fp32.content_digest == in_bf16.content_digest
    for one, other in zip(in_fp32.blocks, in_bf16.blocks, strict=True):
        assert one.update_sqnr_db == pytest.approx(other.update_sqnr_db, abs=MOST_DB)


def quantize(source: Path, folder: Path) -> QuantizedCheckpoint:
    return quantize_checkpoint(
        open_source(source),
        folder / "q.safetensors",
        random_samples(),
        QuantizeOptions(),
        folder.parent / "statistics",
        ignore_progress,
    )
