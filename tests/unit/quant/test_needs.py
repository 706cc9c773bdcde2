"""What is said before a quantization is what it then takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from flux_fp4.quant.needs import needs_of
from flux_fp4.quant.quantized_checkpoint import is_in_plan
from flux_fp4.quant.sources.source import open_source
from pack_import import ROOT
from quantize_tiny import quantize, with_recipe
from tiny_flux import random_flux, save_flux

HEADER_BYTES = 200_000
"""Names, places and reports of the tiny model's tensors."""


@pytest.mark.parametrize("name", ["nvfp4-max", "nvfp4-svdquant-r16", "nvfp4-fp8mix", "fp8", "bf16"])
@pytest.mark.parametrize("modulation", ["bf16", "nvfp4"])
def test_checkpoint_has_the_bytes_that_were_said(
    tmp_path: Path, name: str, modulation: str
) -> None:
    source = save_flux(random_flux(), tmp_path / "source.safetensors")
    options = with_recipe(name, modulation=modulation)
    needs = needs_of(open_source(source), options)
    quantized = quantize(source, tmp_path / "tiny" / "tiny.safetensors", options)
    assert sum(place.length for place in quantized.tensors.values()) == needs.checkpoint
    assert 0 < quantized.path.stat().st_size - needs.checkpoint < HEADER_BYTES
    in_plans = sum(p.length for n, p in quantized.tensors.items() if is_in_plan(n))
    assert in_plans < needs.plans < 1.1 * in_plans
    written = sum(f.stat().st_size for f in (tmp_path / "tiny" / "statistics").rglob("*.*"))
    assert needs.statistics < 2 * written
    assert written < 4 * needs.statistics


class Shapes:
    """FLUX.1-dev without weights."""

    def __init__(self) -> None:
        import sys

        sys.path.append(str(ROOT / "benchmarks"))
        from recipe_sizes import FLUX1_DEV, Shapes, tensor_shapes

        found = Shapes(FLUX1_DEV, tensor_shapes(FLUX1_DEV))
        self.config, self.shapes, self.dtype = found.config, found.shapes, found.dtype


@pytest.mark.parametrize(
    ("recipe", "measured_gb"), [("nvfp4-max", 1.2), ("nvfp4-svdquant-r32", 1.6)]
)
def test_memory_at_full_size_is_near_what_was_measured(recipe: str, measured_gb: float) -> None:
    needs = needs_of(Shapes(), with_recipe(recipe))  # type: ignore[arg-type]
    assert measured_gb <= needs.memory / 1e9 <= 1.15 * measured_gb
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith(f"| `{recipe}` |"))
    assert row.endswith(f"| {measured_gb} GB |")


def test_sizes_at_full_size_are_those_of_the_benchmarks() -> None:
    needs = needs_of(Shapes(), with_recipe("nvfp4-max"))  # type: ignore[arg-type]
    # docs/benchmarks.md: 11.4 GB of checkpoint, 5.0 GB of plans, 0.5 GB of statistics
    assert needs.checkpoint / 1e9 == pytest.approx(11.4, abs=0.1)
    assert needs.plans / 1e9 == pytest.approx(5.0, abs=0.1)
    assert needs.statistics / 1e9 == pytest.approx(0.5, abs=0.2)
