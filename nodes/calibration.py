"""Node: CONDITIONING and LATENT to calibration samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from .errors import CalibrationInputError
from .schema import CATEGORY, Samples, description

if TYPE_CHECKING:
    from torch import Tensor

    from ..quant.calibration import Conditioning

DEFAULT_GUIDANCE = 3.5
"""What ComfyUI's FLUX uses without a FluxGuidance node (0.30, ``model_base.Flux.extra_conds``)."""


class CalibrationSamples(io.ComfyNode):
    """Turns prompts and images into samples that show the quantizer which values flow through
    FLUX. Connect the text conditioning of a few typical prompts and the VAE-encoded latents of a
    few good pictures; noise is added at several strengths, no sampling is needed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxFP4CalibrationSamples",
            display_name="FLUX Calibration Samples",
            category=CATEGORY,
            description=description(CalibrationSamples),
            search_aliases=["fp4", "nvfp4", "calibrate", "quantize", "ptq", "amax"],
            inputs=[
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="Prompts typical for your images. Guidance set by FluxGuidance is "
                    "used, otherwise 3.5. Combine several prompts with 'Conditioning (Combine)'.",
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="Pictures encoded with 'VAE Encode'. A batch gives one sample per "
                    "picture. An empty latent is refused.",
                ),
                io.Int.Input(
                    "timesteps",
                    default=8,
                    min=1,
                    max=64,
                    tooltip="Noise levels per picture, spread evenly from clean to pure noise. "
                    "More levels cost time in quantization, not in sampling.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    # The frontend would otherwise randomize an input of this name after each run,
                    # and every run would quantize again.
                    control_after_generate=False,
                    tooltip="Seed of the noise that is mixed into the pictures.",
                ),
            ],
            outputs=[
                Samples.Output(
                    display_name="samples",
                    tooltip="Samples for 'Quantize FLUX to FP4' or 'FLUX FP4 from Checkpoint'.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, conditioning: list[Any], latent: dict[str, Any], timesteps: int, seed: int
    ) -> io.NodeOutput:
        from ..quant.calibration import rectified_flow_samples

        latents = model_space_latents(latent)
        prompts = prompts_of(conditioning)
        samples = rectified_flow_samples(latents, prompts, timesteps, seed)
        text = (
            f"{len(samples.samples)} samples: {len(latents)} pictures, {len(prompts)} prompts, "
            f"{timesteps} noise levels"
        )
        return io.NodeOutput(samples, ui=ui.PreviewText(text))


def model_space_latents(latent: dict[str, Any]) -> Tensor:
    """Return the pictures ``[n, 16, h, w]`` as FLUX sees them, h and w even.

    Raises:
        CalibrationInputError: It is not a batch of FLUX picture latents, or it is empty.
    """
    import comfy.latent_formats
    from comfy.ldm.common_dit import pad_to_patch_size

    pictures = latent["samples"]
    flux = comfy.latent_formats.Flux()
    if pictures.ndim != 4 or pictures.shape[1] != flux.latent_channels:
        raise CalibrationInputError(
            f"This latent has the shape {tuple(pictures.shape)}",
            f"FLUX latents are [pictures, {flux.latent_channels}, height, width]",
            "Encode the pictures with FLUX's own VAE.",
        )
    if not pictures.any():
        raise CalibrationInputError(
            "This latent is empty",
            "calibration needs real pictures, because noise alone has other value ranges",
            "Connect 'Load Image' and 'VAE Encode' instead of an empty latent.",
        )
    # FLUX cuts latents into 2x2 patches; ComfyUI pads odd sizes in the same way when sampling.
    return pad_to_patch_size(flux.process_in(pictures), (2, 2))


def prompts_of(conditioning: list[Any]) -> list[Conditioning]:
    """Return every prompt of a CONDITIONING list, batches split into single prompts.

    Raises:
        CalibrationInputError: The list is empty or does not come from a FLUX text encoder.
    """
    from ..quant.calibration import Conditioning

    prompts = []
    for context, options in conditioning:
        pooled = options.get("pooled_output")
        prompts += [
            Conditioning(
                context=context[row : row + 1],
                # One pooled vector may serve a whole batch, as in ComfyUI's broadcasting.
                pooled=None if pooled is None else pooled[row % len(pooled)][None],
                guidance=options.get("guidance", DEFAULT_GUIDANCE),
            )
            for row in range(len(context))
        ]
    if not prompts:
        raise CalibrationInputError(
            "This conditioning holds no prompt",
            "calibration needs at least one",
            "Connect 'CLIP Text Encode'.",
        )
    return prompts
