"""Node: CONDITIONING and LATENT to calibration samples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from . import paths
from .errors import CalibrationInputError
from .failures import told
from .schema import CATEGORY, Samples, description

if TYPE_CHECKING:
    from comfy.latent_formats import LatentFormat
    from torch import Tensor

    from ..quant.calibration import Conditioning

DEFAULT_GUIDANCE = 3.5
"""What ComfyUI's FLUX uses without a FluxGuidance node (0.30, ``model_base.Flux.extra_conds``)."""

FLUX2_TEXT_TOKENS = 512
"""ComfyUI puts zeros before a shorter text (0.30, ``model_base.Flux2.extra_conds``)."""

MASK_CHANNELS = 64
"""An 8x8 patch of the mask per latent pixel (0.30, ``model_base.Flux.concat_cond``)."""


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
                io.String.Input(
                    "save_as",
                    display_name="save as",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Name under which the samples are also saved, in models/flux_fp4/"
                    "samples, for the command line. Empty saves nothing.",
                ),
            ],
            outputs=[
                Samples.Output(
                    display_name="samples",
                    tooltip="Samples for 'Quantize FLUX to FP4', 'Quantize FLUX MODEL to FP4' or "
                    "'FLUX FP4 from Checkpoint'.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, save_as: str | None = None) -> bool | str:
        # an empty name saves nothing
        return paths.name_verdict(save_as or None, "FLUX Calibration Samples")

    @classmethod
    @told
    def execute(
        cls,
        conditioning: list[Any],
        latent: dict[str, Any],
        timesteps: int,
        seed: int,
        save_as: str = "",
    ) -> io.NodeOutput:
        from ..quant.calibration import rectified_flow_samples
        from ..quant.calibration_files import save_samples

        latents = model_space_latents(latent)
        prompts = prompts_of(conditioning, latents)
        samples = rectified_flow_samples(latents, prompts, timesteps, seed)
        text = (
            f"{len(samples.samples)} samples: {len(latents)} pictures, {len(prompts)} prompts, "
            f"{timesteps} noise levels"
        )
        if save_as:
            file = paths.samples_file(save_as)
            save_samples(samples, file)
            text += f"\nsaved as {file.name}"
        return io.NodeOutput(samples, ui=ui.PreviewText(text))


def model_space_latents(latent: dict[str, Any]) -> Tensor:
    """Return the pictures ``[n, C, h, w]`` as FLUX.1 (C = 16) or FLUX.2 (C = 128) sees them.

    Raises:
        CalibrationInputError: It is not a batch of FLUX picture latents, or it is empty.
    """
    pictures = latent["samples"]
    if pictures.ndim != 4:
        raise CalibrationInputError(
            f"This latent has the shape {tuple(pictures.shape)}",
            "FLUX latents are [pictures, channels, height, width]",
            "Encode the pictures with FLUX's own VAE.",
        )
    space = _latent_format(pictures)
    if not pictures.any():
        raise CalibrationInputError(
            "This latent is empty",
            "calibration needs real pictures, because noise alone has other value ranges",
            "Connect 'Load Image' and 'VAE Encode' instead of an empty latent.",
        )
    return space.process_in(pictures)


def prompts_of(conditioning: list[Any], latents: Tensor) -> list[Conditioning]:
    """Return every prompt of a CONDITIONING list, batches split into single prompts.

    Args:
        conditioning: ComfyUI's list.
        latents: The pictures ``[n, C, h, w]`` it will be used with, in model space.

    Raises:
        CalibrationInputError: The list is empty.
    """
    from ..quant.calibration import Conditioning

    space = _latent_format(latents)
    prompts = []
    for context, options in conditioning:
        pooled = options.get("pooled_output")
        references = options.get("reference_latents") or ()
        concat = _concat_channels(options, latents, space)
        prompts += [
            Conditioning(
                context=_padded_text(context[row : row + 1], space),
                # One pooled vector may serve a whole batch, as in ComfyUI's broadcasting.
                pooled=None if pooled is None else pooled[row % len(pooled)][None],
                guidance=options.get("guidance", DEFAULT_GUIDANCE),
                concat=concat,
                references=tuple(space.process_in(reference) for reference in references),
                reference_method=options.get("reference_latents_method"),
            )
            for row in range(len(context))
        ]
    if not prompts:
        raise CalibrationInputError(
            "This conditioning holds no prompt",
            "calibration needs at least one",
            "Connect 'CLIP Text Encode (Prompt)'.",
        )
    return prompts


def _latent_format(pictures: Tensor) -> LatentFormat:
    from comfy.latent_formats import Flux, Flux2

    formats = {space.latent_channels: space for space in (Flux, Flux2)}
    channels = pictures.shape[1]
    if channels not in formats:
        limit = ", ".join(f"{n} (FLUX.{i})" for i, n in enumerate(formats, start=1))
        raise CalibrationInputError(
            f"This latent has {channels} channels",
            f"FLUX latents have {limit}",
            "Encode the pictures with FLUX's own VAE.",
        )
    return formats[channels]()


def _concat_channels(
    options: dict[str, Any], latents: Tensor, space: LatentFormat
) -> Tensor | None:
    """Return what inpainting or control conditioning adds to each latent, ``[n, E, h, w]``."""
    import comfy.model_base

    given = {
        name: options[name]
        for name in ("concat_latent_image", "concat_mask")
        if options.get(name) is not None
    }
    if not given:
        return None
    channels = latents.shape[1]
    extra = channels + (MASK_CHANNELS if "concat_mask" in given else 0)
    # ComfyUI's own arithmetic. It asks a model for no more than this; which variant the samples
    # are for is not known here, and checked when they are used.
    model = SimpleNamespace(
        model_config=SimpleNamespace(
            unet_config={"in_channels": channels + extra, "out_channels": channels}
        ),
        process_latent_in=space.process_in,
    )
    concat: Tensor = comfy.model_base.Flux.concat_cond(
        model, noise=latents, device=latents.device, **given
    )
    return concat


def _padded_text(context: Tensor, space: LatentFormat) -> Tensor:
    from comfy.latent_formats import Flux2
    from torch.nn.functional import pad

    missing = FLUX2_TEXT_TOKENS - context.shape[1]
    if not isinstance(space, Flux2) or missing <= 0:
        return context
    return pad(context, (0, 0, missing, 0))
