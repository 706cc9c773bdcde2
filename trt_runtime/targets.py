"""What a user chooses before a build, and the BuildSpec that it stands for."""

from __future__ import annotations

import math

from .errors import BUILD_NODE
from .errors.build import BuildSpecError
from .spec import BuildSpec, ShapeProfile

TARGETS = {
    "sm120": ("GeForce RTX 50, RTX PRO Blackwell", "tensorrt_rtx", ("sm120",)),
    "sm121": ("DGX Spark (GB10)", "tensorrt_rtx", ("sm121",)),
    "sm120+sm121": ("both of these", "tensorrt_rtx", ("sm120", "sm121")),
    "sm89": ("GeForce RTX 40, recipes fp8 and bf16", "tensorrt_rtx", ("sm89",)),
    "sm86": (
        "GeForce RTX 30, recipe bf16 with FP8 attention off",
        "tensorrt_rtx",
        ("sm86",),
    ),
    "tensorrt-sm100": ("B200, GB200", "tensorrt", ("sm100",)),
    "tensorrt-sm103": ("B300, GB300", "tensorrt", ("sm103",)),
    "tensorrt-sm120": ("GeForce RTX 50 through TensorRT", "tensorrt", ("sm120",)),
}
"""Engine folder names with the GPUs they are for, the backend and its targets."""

TOKENS_PER_MEGAPIXEL = 4096
"""1024 x 1024 pixels in FLUX's 16 x 16 pixel patches."""

MIN_TOKENS = 16
"""Of image (64 x 64 pixels) and of text. TensorRT-RTX 1.7 fuses FP8 attention only for profiles
that start at 32 tokens in all or more; with a single head (the test model) also only for profiles
that reach to about one megapixel."""


def build_spec(
    target: str, max_megapixels: float, max_batch: int, max_text_tokens: int
) -> BuildSpec:
    """Return what to build for the user's choices.

    Kernels are tuned for one megapixel and 512 text tokens, FLUX's usual sizes.

    Raises:
        BuildSpecError: The target is none of ``TARGETS``, or no picture or text fits the limits.
    """
    if target not in TARGETS:
        raise BuildSpecError(
            f"Target '{target}' is unknown",
            f"there are {', '.join(TARGETS)}",
            f"Choose another 'target' in {BUILD_NODE}.",
        )
    _, backend, targets = TARGETS[target]
    profile = ShapeProfile(
        max_batch=max_batch,
        min_img_tokens=MIN_TOKENS,
        opt_img_tokens=TOKENS_PER_MEGAPIXEL,
        max_img_tokens=math.ceil(max_megapixels * TOKENS_PER_MEGAPIXEL),
        min_txt_tokens=MIN_TOKENS,
        opt_txt_tokens=min(512, max_text_tokens),
        max_txt_tokens=max_text_tokens,
    )
    return BuildSpec(backend=backend, targets=targets, profile=profile)
