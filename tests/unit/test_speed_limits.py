"""The published limits are what the program reckons."""

from __future__ import annotations

import sys

from flux_fp4.quant.roofline.gpus import known_gpus
from pack_import import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from speed_limits import PAGE, by_gpu, page_with_tables


def test_tables_are_what_the_program_writes() -> None:
    """Otherwise run `python benchmarks/speed_limits.py`."""
    text = PAGE.read_text(encoding="utf-8")
    assert page_with_tables(text) == text


def test_every_gpu_has_a_row() -> None:
    assert [row[0] for row in by_gpu()] == list(known_gpus())
