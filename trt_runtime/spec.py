"""What to build: targets and the range of shapes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .errors import BUILD_NODE
from .errors.build import BuildSpecError
from .errors.run import ShapeProfileError

BACKENDS = ("tensorrt_rtx", "tensorrt")

RANK_AXIS = "R_"
"""Start of the name of an axis that is the rank of a Linear's adapters, in tiles."""

RANK_TILE = 16
"""Size of the second of the two axes that make a rank. bf16 tensor cores multiply 16 at a time, so
other ranks save nothing; and where a shape does not show the multiple, TensorRT-RTX 1.7 copies each
factor in a kernel of its own."""

FP4_TARGETS = ("sm100", "sm103", "sm120", "sm121")
"""GPU generations with NVFP4 tensor cores (Blackwell)."""

FP8_MIN_SM = 89
"""First GPU generation with FP8 tensor cores (Ada)."""

BF16_MIN_SM = 80
"""First GPU generation with bf16 tensor cores (Ampere)."""

RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""Members of tensorrt_rtx.ComputeCapability in 1.7."""


MAX_LORA_RANK = 512
"""Largest rank of all adapters on one Linear together, SVDQuant's branch included. Raise
`plan.SETTINGS_VERSION` with it: it is part of every variant's optimization profile."""

OPT_LORA_RANK = 32
"""The rank that most FLUX LoRAs have, or half of it twice."""

FP8_ATTENTION_MIN_TOKENS = 32
"""TensorRT-RTX 1.7 fuses FP8 attention only if the profile's minimum of image and text tokens
together is at least this; below, it silently builds three kernels with the scores in memory."""


@dataclass(frozen=True)
class TokenRange:
    """Allowed number of tokens on one axis; it both checks and describes itself."""

    label: str
    """What the tokens are, as the user reads it."""
    minimum: int
    optimum: int
    maximum: int
    widget: str
    """The widget of the build node that raises the maximum."""

    def __post_init__(self) -> None:
        """Reject an empty or unordered range."""
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise BuildSpecError(
                f"{self.minimum}, {self.optimum}, {self.maximum} do not limit {self.label} tokens",
                "it takes 1 <= min <= opt <= max",
                f"Enter another '{self.widget}' in {BUILD_NODE}.",
            )

    def check(self, tokens: int) -> None:
        """Raise ShapeProfileError when `tokens` is outside."""
        if not self.minimum <= tokens <= self.maximum:
            raise ShapeProfileError(self.label, tokens, self.minimum, self.maximum, self.widget)

    def describe(self) -> str:
        """Return the range as text."""
        return f"{self.label} tokens {self.minimum} to {self.maximum}"


@dataclass(frozen=True)
class ShapeProfile:
    """Shapes that one engine accepts; activation memory grows with the maxima."""

    max_batch: int = 1
    """Larger batches are split at run time."""
    min_img_tokens: int = 64
    opt_img_tokens: int = 4096
    """1024x1024 pixels: FLUX patches are 16x16 pixels."""
    max_img_tokens: int = 4096
    min_txt_tokens: int = 1
    opt_txt_tokens: int = 512
    max_txt_tokens: int = 512

    def __post_init__(self) -> None:
        """Reject ranges that no shape fits."""
        if self.max_batch < 1:
            raise BuildSpecError(
                f"The largest batch is {self.max_batch}",
                "it must be at least 1",
                f"Enter another 'max batch' in {BUILD_NODE}.",
            )
        for axis in ("N", "T"):
            self.range(axis)

    def range(self, axis: str) -> TokenRange:
        """Return the range of a dynamic axis: N image, T text, S both."""
        img = (self.min_img_tokens, self.opt_img_tokens, self.max_img_tokens)
        txt = (self.min_txt_tokens, self.opt_txt_tokens, self.max_txt_tokens)
        if axis == "N":
            return TokenRange("image", *img, widget="max megapixels")
        if axis == "T":
            return TokenRange("text", *txt, widget="max text tokens")
        low, middle, high = (i + t for i, t in zip(img, txt, strict=True))
        return TokenRange("image and text", low, middle, high, "max megapixels")

    def bounds(self, axis: str) -> tuple[int, int, int]:
        """Return (min, opt, max) of a dynamic axis for an optimization profile.

        Axes are B, N, T, S, and ``R_<linear>`` for the rank of a Linear's adapters in
        tiles.
        """
        if axis == "B":
            return 1, 1, self.max_batch
        if axis.startswith(RANK_AXIS):
            return 1, OPT_LORA_RANK // RANK_TILE, MAX_LORA_RANK // RANK_TILE
        tokens = self.range(axis)
        return tokens.minimum, tokens.optimum, tokens.maximum


@dataclass(frozen=True)
class BuildSpec:
    """Everything that names an engine besides its checkpoint."""

    backend: str = "tensorrt_rtx"
    targets: tuple[str, ...] = ("sm120",)
    """Compute capabilities, lower case; one plan can hold kernels for several."""
    profile: ShapeProfile = field(default_factory=ShapeProfile)

    def __post_init__(self) -> None:
        """Reject unknown backends and targets; order the targets."""
        if self.backend not in BACKENDS:
            raise BuildSpecError(
                f"Backend '{self.backend}' cannot build plans",
                f"{' and '.join(BACKENDS)} can",
                f"Choose another 'target' in {BUILD_NODE}.",
            )
        targets = tuple(sorted(set(self.targets), key=lambda sm: (len(sm), sm)))
        known = RTX_TARGETS if self.backend == "tensorrt_rtx" else None
        bad = [
            t for t in targets if not (t in known if known else re.fullmatch(r"sm[0-9]{2,3}", t))
        ]
        if bad or not targets:
            raise BuildSpecError(
                f"Target '{bad[0] if bad else ''}' is unknown to {self.backend}",
                f"it knows {', '.join(known or FP4_TARGETS)}",
                f"Choose another 'target' in {BUILD_NODE}.",
            )
        object.__setattr__(self, "targets", targets)

    @property
    def folder_name(self) -> str:
        """Folder of this engine below the checkpoint's folder, such as "sm120"."""
        name = "+".join(self.targets)
        return name if self.backend == "tensorrt_rtx" else f"{self.backend}-{name}"
