"""What the tests build: small shapes that still allow every kernel."""

from __future__ import annotations

from flux_fp4.trt_runtime.spec import BuildSpec, ShapeProfile

SMALL_PROFILE = ShapeProfile(
    max_batch=2,
    min_img_tokens=32,
    opt_img_tokens=64,
    max_img_tokens=256,
    opt_txt_tokens=16,
    max_txt_tokens=32,
)
SMALL_SPEC = BuildSpec(profile=SMALL_PROFILE)


def silent(phase: str, done: int, total: int) -> None:
    """Take progress and do nothing."""
