"""The engine that the attacks change."""

from __future__ import annotations

from flux_fp4.tests.unit.trt_runtime.conftest import blocks, built_folder, engine_copy

__all__ = ["blocks", "built_folder", "engine_copy"]
