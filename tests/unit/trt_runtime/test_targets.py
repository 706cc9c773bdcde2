"""What a user chooses becomes a BuildSpec, or a refusal."""

from __future__ import annotations

import pytest
from flux_fp4.trt_runtime.errors.build import BuildSpecError
from flux_fp4.trt_runtime.targets import TARGETS, build_spec


@pytest.mark.parametrize("target", TARGETS)
def test_folder_names_are_the_targets(target: str) -> None:
    spec = build_spec(target, 2.0, 3, 768)
    assert spec.folder_name == target
    assert spec.profile.bounds("N") == (16, 4096, 8192)
    assert spec.profile.bounds("T") == (16, 512, 768)
    assert spec.profile.bounds("B") == (1, 1, 3)


@pytest.mark.parametrize(
    "values",
    [("sm75", 2.0, 1, 512), ("sm120", 0.5, 1, 512), ("sm120", 2.0, 0, 512), ("sm120", 2.0, 1, 0)],
)
def test_what_cannot_be_built_is_refused(values: tuple[str, float, int, int]) -> None:
    with pytest.raises(BuildSpecError):
        build_spec(*values)
