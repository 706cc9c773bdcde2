"""Errors about the checkpoint that is to be quantized."""

from __future__ import annotations

from collections.abc import Sequence

from . import QuantError, shortened


class UnknownCheckpointError(QuantError):
    """The file holds no FLUX transformer that this version can quantize.

    Attributes:
        name: File name of the checkpoint.
        reason: What was found instead.
        missing: FLUX tensors that the file lacks.
        next_step: What to do instead.
    """

    def __init__(
        self,
        name: str,
        reason: str,
        missing: Sequence[str] = (),
        next_step: str = "Choose a FLUX diffusion model in 'Quantize FLUX to FP4'.",
    ) -> None:
        self.name, self.reason, self.missing = name, shortened(reason), tuple(missing)
        self.next_step = next_step
        lacks = ""
        if missing:
            first = shortened(", ".join(f"'{tensor}'" for tensor in self.missing[:3]))
            lacks = f" It lacks {len(missing)} FLUX tensors (first: {first})."
        super().__init__(
            f"'{name}' is no FLUX transformer that can be quantized: {self.reason}.{lacks} "
            f"{next_step}"
        )


class DamagedCheckpointError(QuantError):
    """A FLUX checkpoint contradicts itself: a file, a tensor or a scale is missing or wrong.

    Attributes:
        name: File name of the checkpoint.
        reason: What is wrong, with the tensor's name.
        next_step: What to do about it.
    """

    def __init__(
        self,
        name: str,
        reason: str,
        next_step: str = "Get the file anew, or choose another one in 'Quantize FLUX to FP4'.",
    ) -> None:
        self.name, self.reason, self.next_step = name, shortened(reason), next_step
        super().__init__(f"'{name}' cannot be read: {self.reason}. {next_step}")


class UnsupportedWeightError(QuantError):
    """A weight has a dtype or a shape that NVFP4 cannot hold.

    Attributes:
        linear: Name of the Linear, for example ``double_blocks.0.img_attn.qkv``.
        found: The offending property with its value.
        limit: What is required.
    """

    def __init__(self, linear: str, found: str, limit: str) -> None:
        self.linear, self.found, self.limit = linear, found, limit
        super().__init__(
            f"Cannot quantize '{shortened(linear)}' to NVFP4: {shortened(found)}; {limit}. "
            "Choose a checkpoint with bf16, fp16 or fp32 weights of FLUX's own sizes."
        )


class NoiseCheckpointError(QuantError):
    """A model decoded from NVFP4 predicts nothing: its weights were read in the wrong order.

    Attributes:
        name: Of the checkpoint.
        layout: As which it was read.
        velocity_sqnr_db: How well it predicts the velocity of the calibration samples.
    """

    def __init__(self, name: str, layout: str, velocity_sqnr_db: float) -> None:
        self.name, self.layout, self.velocity_sqnr_db = name, layout, velocity_sqnr_db
        super().__init__(
            f"'{name}' was read as {layout}, and such a model predicts your calibration pictures "
            f"at {velocity_sqnr_db:.1f} dB; above 0 dB is needed. Either the file orders its FP4 "
            "values in another way than it says, or the pictures are not encoded for this model. "
            "Choose the bf16 checkpoint, or encode the pictures with the model's own VAE."
        )
