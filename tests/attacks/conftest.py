"""The engine that the attacks change, and a bound on the memory that an attack may cost."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import psutil
import pytest
from flux_fp4.tests.unit.trt_runtime.conftest import blocks, built_folder, engine_copy

__all__ = ["blocks", "built_folder", "engine_copy"]

MAX_GROWTH = 4 << 30
"""Of the address space, libraries that a test is the first to import included."""


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """Let an allocation fail that no reader of a small file needs."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    soft = psutil.Process().memory_info().vms + MAX_GROWTH
    resource.setrlimit(resource.RLIMIT_AS, (soft, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
