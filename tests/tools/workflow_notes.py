"""The notes inside the shipped workflows: what it does, which files it needs, what to change."""

# ruff: noqa: E501 - a line of a note is a paragraph

from __future__ import annotations

_TEXTS = (
    "- `models/text_encoders/clip_l.safetensors`, `t5xxl_fp16.safetensors`\n"
    "- `models/vae/ae.safetensors`\n"
)

_NO_GPU = (
    "Without a supported GPU the engine still gets built, and the slow CPU reference makes the "
    "picture.\n"
)

_ONCE = (
    "The engine is made in the first run and found again in later ones. Other calibration pictures "
    "make it anew: leave them as they are.\n"
)

FULL_PIPELINE = f"""# FLUX.1 checkpoint to FP4 engine to picture

Files (names are examples, choose yours):

- `models/diffusion_models/flux1-dev.safetensors`
{_TEXTS}
1. Load a typical picture (or a batch) and describe it: it calibrates the FP4 scales.
2. *Quantize*, *Export* and *Build* run once. Later runs skip what is up to date, and go on where you cancelled.
3. The engine is an ordinary MODEL.

{_NO_GPU}
Next time: open *flux_fp4_load_engine*.
"""

LOAD_ENGINE = f"""# Sample with a FLUX FP4 engine

Choose an engine made by *flux_fp4_full_pipeline* in *Load FLUX FP4 Engine*.

- `models/flux_fp4/<name>/<target>/` holds the engine
{_TEXTS}
Engines are executable code: load only your own.
"""

LORA = f"""# A LoRA on a FLUX FP4 engine

- an engine made by *flux_fp4_full_pipeline*
- `models/loras/my_lora.safetensors`
{_TEXTS}
*lora* of *Load FLUX FP4 Engine* decides how the LoRA works:

- `runtime`: another LoRA or strength acts at once, at some cost per step.
- `baked`: no cost per step. Blocks that the LoRA touches are quantized again from the original and rebuilt, and kept.

More *Load LoRA* nodes in a row work too.
"""

MERGE_LORA = f"""# FLUX.1 with a LoRA merged in, to FP4 engine to picture

For a LoRA that you always use. To switch LoRAs, open *flux_fp4_lora* instead.

Files (names are examples, choose yours):

- `models/diffusion_models/flux1-dev.safetensors`
- `models/loras/my_lora.safetensors`
{_TEXTS}
1. Calibrate with pictures in the LoRA's style and a prompt with its trigger words.
2. Set the strength; add more LoRA loaders in a row if you like. Each strength is a model of its own: change *name* to keep both.
3. The engine is an ordinary MODEL.

Next time: open *flux_fp4_load_engine* and choose the new engine.
"""

SVDQUANT = f"""# SVDQuant: closer to the original

A branch of rank 32 in bf16 beside every Linear takes what FP4 rounds worst. No training; it costs some time in every step.

- `models/diffusion_models/flux1-dev.safetensors`
{_TEXTS}
{_ONCE}
*recipe* has other ranks, and recipes without a branch.
"""

LOW_VRAM = f"""# FLUX.1 on a GPU with little memory

What is set here, in *FLUX FP4 from Checkpoint* (open its advanced inputs):

- *modulation* `nvfp4` and *modulation weights* `main memory`: these weights visit the GPU once per prompt
- *engine memory limit*: GB on the GPU for the engine; what does not fit is loaded again in every step. 0 is no limit
- *max megapixels* 1

and in *DualCLIPLoader*: `t5xxl_fp8_e4m3fn.safetensors` takes half of the memory of fp16.

- `models/diffusion_models/flux1-dev.safetensors`
{_TEXTS}
ComfyUI moves things by itself when memory is short; set a limit only if that is not enough.

{_ONCE}"""

SCHNELL = f"""# FLUX.1 schnell in four steps

- `models/diffusion_models/flux1-schnell.safetensors`
{_TEXTS}
schnell knows no guidance, so there is no *FluxGuidance*.

{_ONCE}
{_NO_GPU}"""

COMPARE = f"""# What FP4 costs, measured

- `models/diffusion_models/flux1-dev.safetensors`, the original
- an engine made from it by *flux_fp4_full_pipeline*
{_TEXTS}
Both draw the same noise.

1. The error of the velocity at every step: of the engine alone, and of what has added up.
2. Metrics of the pictures, with intervals, and the worst pairs beside a map of their difference.

Two pictures are an example; *FLUX FP4 Compare Images* says how many would show a difference.
"""

BATCH_BUILD = f"""# Engines of several checkpoints

Queue it once and leave: each row is one engine, one after the other. Finished ones are skipped the next time, and a cancelled run goes on.

- checkpoints of the same architecture in `models/diffusion_models/`
{_TEXTS}
The samples serve all rows. Give a checkpoint of another style pictures of its own: copy frame 1.

Copy a row for another checkpoint; *name* must be new.
"""

KONTEXT = f"""# Edit a picture with FLUX.1 Kontext

- `models/diffusion_models/flux1-dev-kontext.safetensors`
{_TEXTS}
1. Calibrate as for any FLUX.
2. *max megapixels* counts the picture and its reference together: 2.1 for one megapixel each.
3. Load a picture and say what to change.

{_ONCE}
{_NO_GPU}"""

FILL = f"""# Paint a part anew with FLUX.1 Fill

- `models/diffusion_models/flux1-fill-dev.safetensors`
{_TEXTS}
Draw the mask in *Load Image*: right click, *Open in Mask Editor*. The calibration picture needs one, too.

For outpainting put *Pad Image for Outpainting* behind *Load Image*.

{_ONCE}
{_NO_GPU}"""

CANNY = f"""# Follow edges with FLUX.1 Canny

- `models/diffusion_models/flux1-canny-dev.safetensors`
{_TEXTS}
1. The calibration picture comes with its own edges.
3. *Canny* finds the edges of your picture; lower thresholds find more.

{_ONCE}
{_NO_GPU}"""

DEPTH = f"""# Follow depth with FLUX.1 Depth

- `models/diffusion_models/flux1-depth-dev.safetensors`
{_TEXTS}
Depth maps are pictures, near is white. Load finished ones, or put the node of your depth estimator (Depth Anything, Lotus) in the place of *Depth map*.

1. The calibration picture comes with its own depth map, in the same size.

{_ONCE}
{_NO_GPU}"""

CONTROLNET = f"""# A ControlNet on a FLUX FP4 engine

- an engine made by *flux_fp4_full_pipeline*
- `models/controlnet/flux-controlnet-union-pro.safetensors`, or another ControlNet for FLUX.1
{_TEXTS}
The ControlNet runs in PyTorch, as it is; the engine takes what it adds to the blocks. It needs no other engine and no calibration.

*Set Union ControlNet Type* says what the picture shows: edges here. Take it out for a ControlNet of one kind.
"""

BENCHMARK = f"""# How fast it is, and how fast it could be

- `models/diffusion_models/flux1-dev.safetensors`, the original
- an engine made from it by *flux_fp4_full_pipeline*
{_TEXTS}
1. What a GPU could do at best, part by part: choose yours, or one that you think of buying.
2. What the engine takes per step, beside the original in bf16 and in FP8, in turns in one run.

Trust the ratios more than the times. The first step has loading and compiling in it.
"""
