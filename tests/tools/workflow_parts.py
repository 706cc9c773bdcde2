"""What the shipped workflows share: loading texts and pictures, calibrating, making, sampling."""

from __future__ import annotations

from dataclasses import dataclass

from workflow_sheet import GAP, MARGIN, TITLE, Column, Node, Output, Sheet

FRAMES = 500
"""Where frames begin, right of the note and the loaders."""
STEP = 30
"""Between columns of a frame."""

CALIBRATION_PROMPT = (
    "A photograph of a small harbour town at sunrise, wooden boats, calm water, soft warm light"
)
PROMPT = (
    "A red fox sitting on a mossy stone in a misty forest, morning light, detailed fur, photograph"
)
ENGINE = "flux1-dev-nvfp4/sm120"
"""What the full pipeline makes, and others load."""
SEED = 7


@dataclass(frozen=True)
class Loaded:
    """What every workflow loads besides its model."""

    clip: Output
    vae: Output


def begin(sheet: Sheet, note: str, height: int) -> Loaded:
    """Put the note, and the loaders of text encoders and VAE below it."""
    column, clip = begin_with_text(sheet, note, height)
    vae = column.put("VAELoader", vae_name="ae.safetensors")
    return Loaded(clip, vae["VAE"])


def begin_with_text(sheet: Sheet, note: str, height: int) -> tuple[Column, Output]:
    """Put the note and the loader of text encoders; return their column, and the encoders."""
    sheet.note(note, height)
    column = sheet.column(0, height + TITLE + 2 * GAP)
    clip = column.put(
        "DualCLIPLoader",
        clip_name1="clip_l.safetensors",
        clip_name2="t5xxl_fp16.safetensors",
        type="flux",
    )
    return column, clip["CLIP"]


def below(sheet: Sheet) -> int:
    """Return where nodes of a frame below all frames begin."""
    ends = [group["bounding"][1] + group["bounding"][3] for group in sheet.groups]
    return max(ends, default=-2 * TITLE - 2 * MARGIN) + 2 * TITLE + 2 * MARGIN


def right_of(sheet: Sheet) -> int:
    """Return where nodes of a frame right of the last frame begin."""
    if not sheet.groups:
        return FRAMES
    x, _, width, _ = sheet.groups[-1]["bounding"]
    return int(x + width + 2 * MARGIN)


def next_to(column: Column) -> Column:
    """Begin a column right of another, as high as that one began."""
    return column.sheet.column(column.x + column.width + STEP, column.top)


def text(
    column: Column, clip: Output, prompt: str, title: str = "Prompt", guidance: float | None = 3.5
) -> Output:
    """Put a prompt and its guidance; None leaves guidance out."""
    written = column.put("CLIPTextEncode", title, clip=clip, text=prompt)["CONDITIONING"]
    if guidance is None:
        return written
    return column.put("FluxGuidance", conditioning=written, guidance=guidance)["CONDITIONING"]


def calibrate(
    sheet: Sheet,
    loaded: Loaded,
    prompt: str = CALIBRATION_PROMPT,
    guidance: float | None = 3.5,
    title: str = "1  Calibrate",
) -> Output:
    """Put a frame that makes calibration samples of a picture and its description."""
    with sheet.frame(title, "calibrate"):
        pictures = sheet.column(right_of(sheet))
        image = pictures.put("LoadImage", "Calibration pictures", image="example.png")
        words = next_to(pictures)
        conditioning = text(words, loaded.clip, prompt, "Calibration prompt", guidance)
        latent = words.put("VAEEncode", pixels=image["IMAGE"], vae=loaded.vae)["LATENT"]
        samples = next_to(words)
        made = samples.put("FluxFP4CalibrationSamples", conditioning=conditioning, latent=latent)
    return made["samples"]


def engine_from(
    sheet: Sheet, checkpoint: str, samples: Output, title: str, **inputs: object
) -> Output:
    """Put a frame with the node that makes and loads an engine in one."""
    with sheet.frame(title, "make"):
        column = sheet.column(right_of(sheet))
        made = column.put(
            "FluxFP4EngineFromCheckpoint", checkpoint=checkpoint, samples=samples, **inputs
        )
    return made["model"]


def make(
    sheet: Sheet, samples: Output, quantizer: str = "FluxFP4Quantize", **inputs: object
) -> Output:
    """Put the stages that make an engine, without a frame; return its name."""
    quantize = sheet.column(right_of(sheet))
    quantized = quantize.put(quantizer, samples=samples, **inputs)["checkpoint"]
    exported = quantize.put("FluxFP4ExportONNX", checkpoint=quantized)["checkpoint"]
    build = next_to(quantize)
    engine = build.put("FluxFP4BuildEngine", checkpoint=exported)["engine"]
    inspect = next_to(build)
    inspected = inspect.put("FluxFP4Inspect", "Quality", checkpoint=engine)
    next_to(inspect).put("PreviewAny", "Report", (460, 380), source=inspected["report"])
    return engine


def custom_sampler(
    column: Column,
    loaded: Loaded,
    model: Output,
    conditioning: Output,
    prefix: str,
    latent: Output | None = None,
    steps: int = 20,
) -> None:
    """Put ComfyUI's sampler for FLUX in three columns, and what stores its pictures."""
    noise = column.put("RandomNoise", noise_seed=SEED)
    sampler = column.put("KSamplerSelect", sampler_name="euler")
    settings = next_to(column)
    guider = settings.put("BasicGuider", model=model, conditioning=conditioning)
    sigmas = settings.put("BasicScheduler", model=model, scheduler="simple", steps=steps)
    latent = latent or settings.put("EmptySD3LatentImage", width=1024, height=1024)["LATENT"]
    drawing = next_to(settings)
    drawn = drawing.put(
        "SamplerCustomAdvanced",
        noise=noise["NOISE"],
        guider=guider["GUIDER"],
        sampler=sampler["SAMPLER"],
        sigmas=sigmas["SIGMAS"],
        latent_image=latent,
    )
    _stored(drawing, loaded, drawn["output"], prefix)


def simple_sampler(
    column: Column,
    loaded: Loaded,
    model: Output,
    conditioned: Node,
    latent: Output,
    prefix: str,
) -> None:
    """Put KSampler at CFG 1 behind a node that gives both conditionings, and what stores it."""
    drawn = column.put(
        "KSampler",
        model=model,
        positive=conditioned["positive"],
        negative=conditioned["negative"],
        latent_image=latent,
        seed=SEED,
        steps=20,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
    )
    _stored(column, loaded, drawn["LATENT"], prefix)


def _stored(column: Column, loaded: Loaded, latent: Output, prefix: str) -> None:
    decoded = column.put("VAEDecode", samples=latent, vae=loaded.vae)
    next_to(column).put("SaveImage", images=decoded["IMAGE"], filename_prefix=prefix)
