"""Draws the README's picture of the whole path, docs/overview.svg.

Usage: python tests/tools/overview_diagram.py
"""

from __future__ import annotations

from diagram import Drawing
from pack_import import ROOT

FILE = ROOT / "docs" / "overview.svg"


def overview() -> Drawing:
    """Draw two rows: making an engine, once, and sampling with it."""
    d = Drawing("From a FLUX checkpoint to an engine, and from the engine to pictures", 430)
    d.frame(4, 4, 892, 230, "once: block by block, resumable, without a GPU")
    checkpoint = d.box("file", 22, 46, 190, 74, "a FLUX model,\nyour finetune")
    pictures = d.box("data", 22, 140, 190, 74, "a few pictures\nand prompts")
    quantize = d.box("work", 262, 84, 150, 92, "quantize\nNVFP4")
    export = d.box("work", 466, 84, 150, 92, "export\nONNX")
    build = d.box("work", 670, 84, 190, 92, "build\nTensorRT plans")
    d.arrow(checkpoint.right, (240, 83), (240, 120), (262, 120))
    d.arrow(pictures.right, (240, 177), (240, 140), (262, 140))
    d.arrow(quantize.right, export.left)
    d.arrow(export.right, build.left)
    plans = d.box("GPU", 670, 288, 190, 92, "one plan\nper block")
    d.arrow(build.bottom, plans.top)
    model = d.box("work", 466, 288, 150, 92, "MODEL")
    d.arrow(plans.left, model.right)
    sampler = d.box("work", 262, 288, 150, 92, "any\nsampler")
    d.arrow(model.left, sampler.right)
    d.picture(60, 282, 104)
    d.arrow(sampler.left, (172, 334))
    d.text(440, 412, "LoRA, ControlNet, Kontext, Fill, masks: ComfyUI's own nodes")
    return d


if __name__ == "__main__":
    FILE.write_text(overview().svg(), encoding="utf-8", newline="\n")
