"""Draws the diagrams of the nodes' help pages, one SVG beside each page.

Usage: python tests/tools/help_diagrams.py

Writes web/docs/<NodeId>.svg.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

from diagram import COLOURS, HEAD, LINE, MINUS, ORANGE, TIMES, WHITE, Drawing
from pack_import import ROOT

PAGES: dict[str, Callable[[], Drawing]] = {}
"""What draws the picture of a page, by the identifier of its node."""


def page(name: str, height: int, title: str) -> Callable[[Callable[[Drawing], None]], None]:
    """Make a function that draws the picture of a page."""

    def add(draw: Callable[[Drawing], None]) -> None:
        def drawn() -> Drawing:
            drawing = Drawing(title, height)
            draw(drawing)
            return drawing

        PAGES[f"FluxFP4{name}"] = drawn

    return add


@page("Benchmark", 440, "Models sample in turns; a table and a chart say what each step took")
def _benchmark(d: Drawing) -> None:
    names = ("A: tested", "B: baseline", "C: third")
    models = [d.box("data", 10, 8 + 76 * row, 150, 58, n) for row, n in enumerate(names)]
    frame = d.frame(230, 4, 400, 218, "rounds, in turns")
    for turn in range(3):
        for row in range(3):
            place = 250 + 125 * turn + 38 * row
            d.box("work", place, 52 + 56 * row, 34, 38, "ABC"[row])
    for model in models:
        d.arrow(model.right, (frame.x - 6, model.right[1]))
    d.text(755, 40, "what else the\nmachine does falls\non all of them")
    d.arrow((430, 222), (430, 268))
    d.label(10, 300, "a step takes", size=HEAD)
    for row, (width, name) in enumerate(((150, "engine"), (500, "bf16"), (300, "FP8"))):
        y = 276 + 52 * row
        d.rect(230, y, width, 40, LINE)
        d.label(244 + width, y + 20, name)
    d.line((330, 268), (330, 324), colour=ORANGE)
    d.label(540, 296, "orange: the least possible", ORANGE)


@page("BuildEngine", 500, "Processes side by side make each block's ONNX file into a plan")
def _build_engine(d: Drawing) -> None:
    d.text(132, 22, "one ONNX per block")
    folder = d.frame(600, 4, 292, 394, "<name>/sm120/")
    workers = [d.box("work", 345, 46 + 136 * i, 180, 118, "worker\nprocess") for i in (0, 1)]
    for row, name in enumerate(("double_blocks.0", "double_blocks.1", "…", "single_blocks.37")):
        y, worker, done = 46 + 68 * row, workers[row // 2], row < 3
        block = d.box("file", 10, y, 245, 50, name)
        plan = d.box("file" if done else "off", 620, y, 252, 50, "plan ✓" if done else "plan")
        d.arrow(block.right, (worker.x, y + 25))
        d.arrow((worker.right[0], y + 25), plan.left, dashed=not done)
    d.box("off", 620, 328, 252, 50, "manifest.json")
    gpu = d.box("GPU", 600, 442, 292, 50, "RTX 50")
    d.arrow(folder.bottom, (gpu.top[0], gpu.y - 8))
    d.label(10, 376, "Cancel keeps finished plans;\nthe next run makes the grey ones.", size=HEAD)
    d.text(400, 467, "need not be in this machine:")


@page("CalibrationSamples", 430, "A picture mixed with noise at eight levels, and prompts: samples")
def _calibration_samples(d: Drawing) -> None:
    cells: list[list[str]] = [[], [], [], []]
    source = random.Random(1)
    for place in range(144):
        cells[int(4 * source.random())].append(f"M{place % 12} {place // 12}h1v1h-1z")
    shades = zip(cells, ("#222", "#666", "#aaa", "#eee"), strict=True)
    noise = "".join(f'<path d="{"".join(cell)}" fill="{shade}"/>' for cell, shade in shades)
    d.parts.append(f'<defs><g id="noise" shape-rendering="crispEdges">{noise}</g></defs>')

    def mixed(x: float, y: float, t: float, turn: int) -> None:
        # noise over a picture with the opacity t is the mixture; turned, it is another noise
        d.picture(x, y, 96)
        place = f"translate({x + 48:g} {y + 48:g}) rotate({turn % 4 * 90})"
        place += f" scale({8 if turn < 4 else -8} 8) translate(-6 -6)"
        d.parts.append(f'<use href="#noise" transform="{place}" opacity="{t:g}"/>')

    for x, t, name in ((40, 0, "picture"), (200, 1, "noise")):
        mixed(x, 4, t, 0)
        d.text(x + 48, 118, name)
    mix = d.box("work", 420, 12, 400, 80, f"x_t = (1 {MINUS} t) · picture\n+ t · noise")
    d.arrow((312, 52), mix.left)
    d.arrow(mix.bottom, (620, 168))
    for level in range(8):
        x, t = 13 + 111 * level, (level + 0.5) / 8
        mixed(x, 176, t, level)
        d.text(x + 48, 292, f"t {t:.2f}")
    prompts = d.box("data", 13, 356, 270, 60, "prompt, guidance")
    samples = d.box("data", 420, 356, 400, 60, "8 samples of the picture")
    d.arrow((620, 312), samples.top)
    d.arrow(prompts.right, samples.left)


@page("CompareImages", 420, "Pairs of pictures give metrics with intervals and the worst pairs")
def _compare_images(d: Drawing) -> None:
    d.text(65, 20, "original")
    d.text(190, 20, "quantized")
    d.rect(4, 156, 243, 118, ORANGE)
    for row, shift in enumerate((-0.02, -0.1, -0.05)):
        for column in range(2):
            d.picture(10 + 125 * column, 42 + 120 * row, 106, shift * column)
    d.label(10, 410, "same prompts and seeds")
    metrics = d.box("work", 310, 136, 150, 118, "PSNR\nSSIM\n…")
    d.arrow((258, 195), metrics.left)
    report = d.box("data", 530, 8, 366, 162)
    d.text(713, 34, "means, 95 % intervals", WHITE)
    for row, (name, middle, half) in enumerate((("PSNR", 750, 50), ("SSIM", 805, 30))):
        y = 84 + 50 * row
        d.label(550, y, name, WHITE)
        a, b = middle - half, middle + half
        whisker = ((a, y - 10), (a, y + 10), (a, y), (b, y), (b, y - 10), (b, y + 10))
        d.line(*whisker, colour=WHITE)
        d.dot(middle, y, 8, WHITE)
    d.arrow(metrics.right, (495, 195), (495, 89), report.left)
    d.arrow((495, 193), (495, 306), (526, 306))
    d.text(655, 218, "the worst pairs", ORANGE)
    d.rect(530, 242, 250, 128, ORANGE)
    d.picture(536, 248, 116)
    d.picture(658, 248, 116, -0.1)
    d.rect(780, 242, 116, 128, "#1a1033")
    for shift, colour in ((0, ORANGE), (-0.1, ORANGE), (-0.05, "#1a1033")):
        d.dot(780 + 116 * (0.68 + shift), 248 + 116 * 0.3, 116 * 0.15, colour)
    d.text(838, 394, "difference")


@page("CompareModels", 460, "Errors at the same latents, and what they add up to by itself")
def _compare_models(d: Drawing) -> None:
    red = COLOURS["bad"]
    way = [(60, 200), (210, 110), (360, 64), (510, 56), (660, 74), (800, 110)]
    own = [(60, 200), (212, 142), (364, 124), (514, 148), (662, 206), (800, 290)]
    d.line(*own, colour=red, dashed=True)
    for (x0, y0), (x1, y1) in pairwise(way):
        d.arrow((x0, y0), (x0 + 0.82 * (x1 - x0), y0 + 0.82 * (y1 - y0) + 30), colour=red)
        d.arrow((x0, y0), (x1, y1))
    for x, y in way:
        d.dot(x, y, 9, LINE)
    d.dot(*own[-1], 9, red)
    d.line((830, 110), (858, 110), (844, 110), (844, 290), (830, 290), (858, 290), colour=red)
    for x, y, number in ((526, 98, "1"), (844, 200, "2")):
        d.dot(x, y, 18, red)
        d.text(x, y, number, WHITE)
    d.text(60, 236, "noise")
    d.text(800, 80, "reference")
    d.text(760, 320, "tested, by itself")
    first = "1: at the same latents,\nthe error of each\npredicted velocity"
    d.box("data", 10, 345, 425, 110, first)
    d.box("data", 465, 345, 425, 110, "2: on its own way\nfrom the same noise,\nerrors add up")


@page("EngineFromCheckpoint", 392, "A checkpoint is quantized, exported, built and loaded as MODEL")
def _engine_from_checkpoint(d: Drawing) -> None:
    samples = d.box("data", 10, 6, 140, 56, "samples")
    source = d.box("file", 180, 6, 300, 56, "flux1-dev.safetensors")
    names = ("quantize", "export", "build", "load")
    made = ("<name>\n.safetensors", "one ONNX\nper block", "one plan\nper block", "MODEL")
    stages = [
        d.box("work", x, 184, 186, 64, n) for x, n in zip((26, 242, 458, 704), names, strict=True)
    ]
    for stage, text in zip(stages, made, strict=True):
        kind = "data" if text == "MODEL" else "file"
        d.arrow(stage.bottom, d.box(kind, stage.x, 304, 186, 80, text).top)
    for before, after in pairwise(stages):
        d.arrow(before.right, after.left)
    d.arrow(samples.bottom, (80, 184))
    d.arrow(source.bottom, (330, 98), (150, 98), (150, 184))
    d.arrow((330, 98), (330, 184), dashed=True)
    d.arrow((400, 184), (400, 150), (674, 150), (674, 212), dashed=True)
    d.label(344, 128, "skip")
    d.text(536, 128, "skip")
    d.label(510, 34, "skip: when up to date", size=HEAD)


@page("EngineManager", 466, "The list of engines with their states, and what the actions do")
def _engine_manager(d: Drawing) -> None:
    d.frame(4, 4, 892, 306, "list")
    names = ("…-max/sm120", "…-mse/sm120", "…-auto/sm120", "…-fp8/sm89")
    states = ("ready", "stale: TensorRT updated", "unfinished build", "other target")
    kinds = ("good", "bad", "off", "off")
    for row, (name, state, kind) in enumerate(zip(names, states, kinds, strict=True)):
        d.box("file", 20, 46 + 65 * row, 230, 50, name)
        box = d.box(kind, 270, 46 + 65 * row, 340, 50, state)
        if kind == "bad":
            d.arrow(d.box("work", 680, box.y, 200, 50, "rebuild stale").left, box.right)
    d.box("work", 4, 330, 360, 60, "verify")
    d.text(184, 434, "every file against\nits digest")
    d.box("work", 400, 330, 496, 60, "collect garbage")
    d.text(648, 434, "deletes what list showed as not\nneeded, never a quantized checkpoint")


@page("ExportONNX", 404, "Small ONNX files, one per block, point into the file of weights")
def _export_onnx(d: Drawing) -> None:
    d.frame(4, 4, 892, 396, "models/flux_fp4/<name>/")
    d.box("file", 20, 232, 860, 110)
    names = ("double_blocks\n.0.onnx", "double_blocks\n.1.onnx", "…", "single_blocks\n.37.onnx")
    for place, name in enumerate(names):
        x = 20 + 216 * place
        for behind in (24, 16, 8):
            d.box("off", x + behind, 74 - behind, 184, 84)
        block = d.box("file", x, 74, 184, 84, name)
        d.rect(x + 16, 246, 152, 36, "#e0b060")
        d.text(x + 92, 264, "bytes", "#000000")
        d.arrow(block.bottom, (x + 92, 242))
    d.text(450, 314, "<name>.safetensors: all the weights", WHITE, HEAD)
    d.text(450, 372, "grey: variants for LoRA, for a mask, for both")


@page("Inspect", 430, "A chart with the SQNR of every block and Linear, and a report")
def _inspect(d: Drawing) -> None:
    source = random.Random(4)
    heights = [110 + 120 * source.random() for _ in range(20)]
    lowest, second = sorted(heights)[:2]
    d.label(10, 22, "SQNR (dB), higher is better")
    for place, height in enumerate(heights):
        x, y = 32 + 27 * place, 328 - height
        d.rect(x, y, 20, height, ORANGE if height <= second else COLOURS["data"])
        d.dot(x + 10, y - 44, 5, LINE)
        d.dot(x + 10, y - (14 if height == lowest else 26), 5, LINE)
        if height == lowest:
            d.dot(x + 10, y - 14, 11, ORANGE, ring=True)
    d.line((20, 46), (20, 330), (580, 330))
    d.text(300, 358, "blocks; the worst tenth in orange")
    d.dot(60, 400, 5, LINE)
    d.label(78, 400, "Linears;")
    d.dot(205, 400, 11, ORANGE, ring=True)
    d.label(226, 400, "the worst one")
    d.box("data", 620, 8, 270, 412)
    d.text(755, 36, "report", WHITE, HEAD)
    for row, name in enumerate(("Summary", "Velocity", "Origin", "Blocks", "Linears", "Engines")):
        d.label(636, 84 + 57 * row, name, WHITE)
        for line, length in enumerate((112, 84, 100)):
            d.rect(764, 67 + 57 * row + 14 * line, length, 6, "#a9c4e6")


@page("LoadEngine", 470, "ComfyUI's own loop runs over blocks that are TensorRT plans")
def _load_engine(d: Drawing) -> None:
    d.frame(192, 110, 516, 230)
    d.text(318, 140, "ComfyUI's own loop")
    control = d.box("data", 359, 6, 180, 56, "ControlNet")
    lora = d.box("data", 568, 6, 140, 56, "LoRA")
    modulation = d.box("work", 276, 396, 346, 64, "modulation (PyTorch)")
    last = d.box("work", 4, 190, 156, 100, "embedders\n(PyTorch)")
    for place, name in enumerate(("plan", "plan", "…", "plan")):
        block = d.box("GPU", 212 + 126 * place, 190, 96, 100, f"block\n{name}")
        d.arrow(last.right, block.left)
        d.arrow((block.top[0], 370), (block.top[0], 298))
        last = block
    d.line((258, 370), (640, 370))
    d.line((449, 370), modulation.top)
    d.arrow(last.right, d.box("work", 740, 190, 156, 100, "final layer\n(PyTorch)").left)
    d.arrow(control.bottom, (449, 230))
    d.arrow(lora.bottom, (638, 182))


@page("Preflight", 500, "What is needed against what is free, and how long each stage will take")
def _preflight(d: Drawing) -> None:
    d.label(4, 40, "main memory", size=HEAD)
    d.label(4, 138, "disk", size=HEAD)
    d.box("data", 200, 16, 226, 48, "needed")
    d.box("bad", 434, 16, 70, 48)
    d.box("bad", 690, 16, 206, 48, "PROBLEM")
    for x, width, text in ((200, 240, "checkpoint"), (444, 120, "plans"), (568, 46, "")):
        d.box("file", x, 114, width, 48, text)
    d.text(586, 184, "statistics")
    for x, y in ((430, 16), (690, 114)):
        d.line((x, y - 12), (x, y + 58))
        d.text(x, y + 72, "free")
    d.label(4, 248, "GPU", size=HEAD)
    d.box("GPU", 200, 224, 300, 48, "runs the target")
    d.label(4, 400, "time", size=HEAD)
    d.label(200, 400, "calibrate\nquantize\nexport\nbuild", size=HEAD)
    for row, (start, width) in enumerate(((340, 90), (420, 170), (340, 50), (360, 80))):
        d.box("work", start, 336 + 33.3 * row, width, 28)
    d.label(640, 400, "ranges, from\nearlier runs\nor a trial", size=HEAD)


@page("Quantize", 490, "16 values share an FP8 scale, a weight has one more; the recipe decides")
def _quantize(d: Drawing) -> None:
    d.text(450, 20, "16 neighbouring values, 4 bits each")
    for place, code in enumerate((0.5, -1, 3, 1.5, 2, -6, 1, 0, -2, 0.5, 4, -3, 1, 1.5, -4, 2)):
        d.box("data", 6 + 55.6 * place, 40, 52, 56, f"{code:g}".replace("-", MINUS))
    d.line((8, 104), (8, 116), (892, 116), (892, 104))
    scales = ("block scale, FP8\none for these 16", "global scale, fp32\none for the whole weight")
    for place, text in enumerate(scales):
        scale = d.box("data", 50 + 450 * place, 152, 350, 84, f"{TIMES} {text}")
        d.line((scale.top[0], 116), scale.top)
    d.frame(4, 268, 436, 216, "blocks: the recipe decides")
    d.box("data", 22, 314, 194, 84, "attention\nqkv, proj")
    d.box("data", 228, 314, 194, 84, "MLP\nboth Linears")
    d.text(222, 440, "NVFP4, FP8 or bf16", size=HEAD)
    d.frame(460, 268, 436, 216, "outside of the engine")
    d.box("off", 478, 314, 194, 84, "embedders,\nfinal layer")
    d.box("off", 684, 314, 194, 84, "modulation")
    d.text(574, 440, "keep their\nprecision")
    d.text(780, 440, "bf16, fp8\nor nvfp4")


@page("QuantizeModel", 350, "LoRAs are added to a MODEL's weights; the sum is rounded once")
def _quantize_model(d: Drawing) -> None:
    d.text(80, 22, "MODEL")
    d.box("data", 10, 46, 140, 140, "weight")
    d.text(190, 116, "+", size=48)
    d.text(268, 116, f"0.8 {TIMES}", size=HEAD)
    d.text(268, 160, "strength")
    d.text(410, 22, "LoRA")
    d.box("data", 340, 46, 30, 140)
    d.box("data", 378, 46, 102, 30)
    total = d.box("data", 560, 46, 140, 140, "sum\nin fp32")
    d.arrow((496, 116), total.left)
    small = d.box("work", 740, 70, 150, 92, "quantize:\nround once")
    d.arrow(total.right, small.left)
    d.arrow(small.bottom, (small.bottom[0], 250))
    d.box("file", 560, 250, 330, 90, "<name>.safetensors\nholds the LoRA")
    text = "not in it: ControlNet, attention\npatches, a text encoder's LoRA"
    d.box("off", 10, 250, 470, 90, text)


@page("SaveNative", 440, "A quantized checkpoint becomes a file for Load Diffusion Model")
def _save_native(d: Drawing) -> None:
    first = d.box("file", 4, 8, 270, 84, "quantized\ncheckpoint")
    save = d.box("work", 330, 18, 120, 64, "save")
    file = d.box("file", 506, 8, 390, 84, "models/diffusion_models/\n<name>.safetensors")
    load = d.box("work", 546, 140, 310, 64, "Load Diffusion Model")
    d.arrow(first.right, save.left)
    d.arrow(save.right, file.left)
    d.arrow(file.bottom, load.top)
    d.text(701, 232, "no engine, no node pack")
    d.frame(4, 140, 440, 294, "recipes")
    d.box("good", 22, 186, 404, 84, "nvfp4-max, nvfp4-mse,\nnvfp4-qat")
    d.box("bad", 22, 286, 404, 130, "refused: fp8, nvfp4-fp8mix,\nnvfp4-awq,\nnvfp4-svdquant-…")
    d.box("GPU", 506, 280, 390, 56, "FP4 GPU: FP4 GEMMs")
    d.box("GPU", 506, 366, 390, 56, "others: saves memory only")


@page("SpeedLimit", 430, "Sizes and a data sheet give the least time of each part of a step")
def _speed_limit(d: Drawing) -> None:
    sizes = d.box("data", 10, 8, 270, 64, "model, recipe, pixels")
    sheet = d.box("GPU", 10, 120, 270, 64, "peaks of a GPU")
    d.label(310, 24, "operations ÷ tensor cores", size=HEAD)
    d.label(310, 66, "bytes ÷ memory, bus", size=HEAD)
    d.text(480, 122, "the longer one is the limit", ORANGE, HEAD)
    d.arrow(sizes.bottom, sheet.top)
    parts = (
        ("Linears", 250, "tensor cores"),
        ("attention", 250, "tensor cores"),
        ("norms, activations", 110, "memory"),
        ("modulation", 40, "the bus"),
    )
    for row, (name, width, cause) in enumerate(parts):
        y = 218 + 52 * row
        d.label(10, y + 20, name, size=HEAD)
        d.rect(310, y, width, 40, LINE)
        d.label(324 + width, y + 20, f"bound by {cause}")
    d.arrow((280, 152), (430, 152), (430, 206))


def main() -> None:
    """Write every diagram."""
    for name, draw in PAGES.items():
        file = ROOT / "web" / "docs" / f"{name}.svg"
        file.write_text(draw().svg(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
