"""Shipped workflows that begin with a picture: edited, filled in, or followed."""

from __future__ import annotations

import workflow_notes as notes
from workflow_parts import (
    ENGINE,
    FRAMES,
    Loaded,
    begin,
    below,
    calibrate,
    custom_sampler,
    engine_from,
    next_to,
    right_of,
    simple_sampler,
    text,
)
from workflow_sheet import Column, Node, Output, Sheet

FILL_GUIDANCE, CANNY_GUIDANCE, DEPTH_GUIDANCE = 30.0, 30.0, 10.0
"""Black Forest Labs' own, as in ComfyUI's templates."""


def kontext_edit(sheet: Sheet) -> None:
    """Change a picture by saying what to change."""
    loaded = begin(sheet, notes.KONTEXT, 420)
    samples = calibrate(sheet, loaded)
    checkpoint = "flux1-dev-kontext.safetensors"
    model = engine_from(
        sheet, checkpoint, samples, "2  Engine (once)", recipe="nvfp4-mse", max_megapixels=2.1
    )
    with sheet.frame("3  Edit", "sample"):
        column = sheet.column(FRAMES, below(sheet))
        picture = column.put("LoadImage", "Picture to edit", image="example.png")["IMAGE"]
        column = next_to(column)
        scaled = column.put("FluxKontextImageScale", image=picture)["IMAGE"]
        latent = column.put("VAEEncode", pixels=scaled, vae=loaded.vae)["LATENT"]
        wish = (
            "Make it winter: fresh snow on the ground and on the roofs, everything else unchanged"
        )
        conditioning = text(column, loaded.clip, wish, "What to change", guidance=2.5)
        conditioning = column.put("ReferenceLatent", conditioning=conditioning, latent=latent)[
            "CONDITIONING"
        ]
        custom_sampler(
            next_to(column), loaded, model, conditioning, "flux_fp4_kontext", latent=latent
        )


def fill_inpaint(sheet: Sheet) -> None:
    """Paint a masked part anew."""
    loaded = begin(sheet, notes.FILL, 440)
    with sheet.frame("1  Calibrate", "calibrate"):
        column = sheet.column(right_of(sheet))
        shown = column.put("LoadImage", "Calibration picture with a mask", image="example.png")
        column = next_to(column)
        conditioning = text(
            column, loaded.clip, "A wooden boat", "What is under the mask", FILL_GUIDANCE
        )
        column = next_to(column)
        masked = _masked(column, loaded, conditioning, conditioning, shown)
        latent = column.put("VAEEncode", pixels=shown["IMAGE"], vae=loaded.vae)["LATENT"]
        column = next_to(column)
        samples = column.put(
            "FluxFP4CalibrationSamples", conditioning=masked["positive"], latent=latent
        )["samples"]
    model = engine_from(
        sheet, "flux1-fill-dev.safetensors", samples, "2  Engine (once)", recipe="nvfp4-mse"
    )
    with sheet.frame("3  Fill in", "sample"):
        column = sheet.column(FRAMES, below(sheet))
        shown = column.put("LoadImage", "Picture with a mask", image="example.png")
        column = next_to(column)
        conditioning = text(column, loaded.clip, "A lighthouse", "What to paint", FILL_GUIDANCE)
        nothing = column.put("ConditioningZeroOut", conditioning=conditioning)["CONDITIONING"]
        column = next_to(column)
        masked = _masked(column, loaded, conditioning, nothing, shown)
        simple_sampler(
            next_to(column),
            loaded,
            model,
            masked,
            masked["latent"],
            "flux_fp4_fill",
        )


def canny(sheet: Sheet) -> None:
    """Follow the edges of a picture."""
    loaded = begin(sheet, notes.CANNY, 420)
    samples = _calibrate_structure(sheet, loaded, CANNY_GUIDANCE, edges=True)
    checkpoint = "flux1-canny-dev.safetensors"
    model = engine_from(sheet, checkpoint, samples, "2  Engine (once)", recipe="nvfp4-mse")
    with sheet.frame("3  Follow the edges", "sample"):
        column = sheet.column(FRAMES, below(sheet))
        picture = column.put("LoadImage", "Picture", image="example.png")["IMAGE"]
        column = next_to(column)
        edges = _edges(column, picture)
        column.put("PreviewImage", "Edges", (300, 260), images=edges)
        column = next_to(column)
        _follow(column, loaded, model, edges, CANNY_GUIDANCE, "flux_fp4_canny")


def depth(sheet: Sheet) -> None:
    """Follow a picture's depth."""
    loaded = begin(sheet, notes.DEPTH, 440)
    samples = _calibrate_structure(sheet, loaded, DEPTH_GUIDANCE, edges=False)
    checkpoint = "flux1-depth-dev.safetensors"
    model = engine_from(sheet, checkpoint, samples, "2  Engine (once)", recipe="nvfp4-mse")
    with sheet.frame("3  Follow the depth", "sample"):
        column = sheet.column(FRAMES, below(sheet))
        shown = column.put("LoadImage", "Depth map, near is white", image="example.png")["IMAGE"]
        column = next_to(column)
        _follow(column, loaded, model, shown, DEPTH_GUIDANCE, "flux_fp4_depth")


def controlnet_union(sheet: Sheet) -> None:
    """A ControlNet beside a finished engine."""
    loaded = begin(sheet, notes.CONTROLNET, 460)
    with sheet.frame("1  Engine and ControlNet", "sample"):
        column = sheet.column(FRAMES)
        model = column.put("FluxFP4LoadEngine", engine=ENGINE)["model"]
        network = column.put(
            "ControlNetLoader", control_net_name="flux-controlnet-union-pro.safetensors"
        )["CONTROL_NET"]
        kind = "canny/lineart/anime_lineart/mlsd"
        network = column.put("SetUnionControlNetType", control_net=network, type=kind)[
            "CONTROL_NET"
        ]
    with sheet.frame("2  What to follow", "sample"):
        column = sheet.column(right_of(sheet))
        picture = column.put("LoadImage", "Picture", image="example.png")["IMAGE"]
        column = next_to(column)
        edges = _edges(column, picture)
        column.put("PreviewImage", "Edges", (300, 260), images=edges)
    with sheet.frame("3  Sample", "sample"):
        column = sheet.column(FRAMES, below(sheet))
        prompt = "A stained glass window in a cathedral, vivid colours, sunlight shining through"
        conditioning = text(column, loaded.clip, prompt)
        nothing = column.put("ConditioningZeroOut", conditioning=conditioning)["CONDITIONING"]
        column = next_to(column)
        guided = column.put(
            "ControlNetApplyAdvanced",
            positive=conditioning,
            negative=nothing,
            control_net=network,
            image=edges,
            vae=loaded.vae,
            strength=0.6,
            end_percent=0.7,
        )
        latent = column.put("EmptySD3LatentImage", width=1024, height=1024)["LATENT"]
        simple_sampler(
            next_to(column),
            loaded,
            model,
            guided,
            latent,
            "flux_fp4_controlnet",
        )


def _calibrate_structure(sheet: Sheet, loaded: Loaded, guidance: float, edges: bool) -> Output:
    """Put a frame that calibrates a model whose latent is joined by another picture's."""
    with sheet.frame("1  Calibrate", "calibrate"):
        column = sheet.column(right_of(sheet))
        picture = column.put("LoadImage", "Calibration picture", image="example.png")["IMAGE"]
        if not edges:
            shown = column.put("LoadImage", "Its depth map", image="example.png")["IMAGE"]
        column = next_to(column)
        if edges:
            shown = _edges(column, picture)
        prompt = "A small harbour town at sunrise, wooden boats, calm water"
        conditioning = text(column, loaded.clip, prompt, "Calibration prompt", guidance)
        column = next_to(column)
        joined = _joined(column, loaded, conditioning, conditioning, shown)
        latent = column.put("VAEEncode", pixels=picture, vae=loaded.vae)["LATENT"]
        column = next_to(column)
        return column.put(
            "FluxFP4CalibrationSamples", conditioning=joined["positive"], latent=latent
        )["samples"]


def _edges(column: Column, picture: Output) -> Output:
    """Put what finds edges; the thresholds are lower than ComfyUI's, for photographs."""
    return column.put("Canny", image=picture, low_threshold=0.15, high_threshold=0.3)["IMAGE"]


def _masked(
    column: Column, loaded: Loaded, positive: Output, negative: Output, shown: Node
) -> Node:
    """Put what joins a picture and its mask to the latent."""
    return column.put(
        "InpaintModelConditioning",
        positive=positive,
        negative=negative,
        vae=loaded.vae,
        pixels=shown["IMAGE"],
        mask=shown["MASK"],
        noise_mask=False,
    )


def _joined(
    column: Column, loaded: Loaded, positive: Output, negative: Output, pixels: Output
) -> Node:
    """Put what joins another picture's latent to the latent."""
    return column.put(
        "InstructPixToPixConditioning",
        positive=positive,
        negative=negative,
        vae=loaded.vae,
        pixels=pixels,
    )


def _follow(
    column: Column,
    loaded: Loaded,
    model: Output,
    shown: Output,
    guidance: float,
    prefix: str,
) -> None:
    prompt = "A mountain village under a starry sky, warm light in the windows, oil painting"
    conditioning = text(column, loaded.clip, prompt, guidance=guidance)
    nothing = column.put("ConditioningZeroOut", conditioning=conditioning)["CONDITIONING"]
    column = next_to(column)
    joined = _joined(column, loaded, conditioning, nothing, shown)
    simple_sampler(
        next_to(column),
        loaded,
        model,
        joined,
        joined["latent"],
        prefix,
    )
