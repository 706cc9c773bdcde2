"""The data file of GPUs, against figures that NVIDIA publishes."""

from __future__ import annotations

import pytest
from flux_fp4.quant.errors.speed import UnknownGpuError
from flux_fp4.quant.roofline.gpus import gpu_peaks, known_gpus


@pytest.mark.parametrize(
    ("name", "unit", "tflops"),
    [
        # half of the "AI TOPS", which count FP4 with sparsity
        ("GeForce RTX 5090", "nvfp4", 3352 / 2),
        ("GeForce RTX 5080", "nvfp4", 1801 / 2),
        ("GeForce RTX 5070 Ti", "nvfp4", 1406 / 2),
        ("GeForce RTX 5070", "nvfp4", 988 / 2),
        ("GeForce RTX 5050", "nvfp4", 421 / 2),
        ("RTX PRO 6000 Blackwell Workstation Edition", "nvfp4", 4000 / 2),
        ("GeForce RTX 5090", "bf16", 210),
        ("GeForce RTX 5080", "bf16", 113),
        ("GeForce RTX 5070 Ti", "bf16", 88),
        ("GeForce RTX 5070", "bf16", 62),
        ("GeForce RTX 4090", "bf16", 165),
        ("GeForce RTX 4080", "bf16", 97),
        ("GeForce RTX 4070 Ti", "bf16", 80),
        ("GeForce RTX 4070", "bf16", 58),
        ("B200", "fp8", 4500),
    ],
)
def test_peaks_are_those_of_the_data_sheets(name: str, unit: str, tflops: float) -> None:
    found = gpu_peaks(name).operations[unit] / 1e12  # type: ignore[index]
    assert found == pytest.approx(tflops, rel=0.01), f"{name}, {unit}: {found:.1f} TFLOPS"


def test_generations_multiply_what_they_can() -> None:
    for gpu in known_gpus().values():
        assert ("nvfp4" in gpu.operations) == gpu.sm.startswith("sm1"), gpu.name
        assert gpu.bandwidth > gpu.bus
        assert gpu.source


def test_names_are_those_of_torch() -> None:
    assert gpu_peaks("NVIDIA GeForce RTX 5090") is known_gpus()["GeForce RTX 5090"]
    assert gpu_peaks("nvidia geforce rtx 5060 ti".replace("nvidia ", "NVIDIA ")).memory == 8 << 30
    assert gpu_peaks("NVIDIA GeForce RTX 5060 Ti", memory=16 << 30).memory == 16 << 30


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 5090 Laptop GPU", "NVIDIA GeForce RTX 5090 D", "", "cpu"]
)
def test_other_gpus_are_refused(name: str) -> None:
    with pytest.raises(UnknownGpuError, match=r"Known are GeForce RTX 5090, .*gpus\.yaml"):
        gpu_peaks(name)
