"""Make a shipped workflow, written for the real FLUX.1-dev, run on the small model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from api_workflow import ApiWorkflow, nodes_of_type, the_node
from PIL import Image
from small_lora import LORA
from small_model_files import DIFFUSION_MODEL, TEXT_ENCODER, VAE
from small_variants import CONTROL, FILL, GUIDANCE, SCHNELL

PICTURE_SIZE = 64
"""Pixels; the size of the small model's training pictures."""
CALIBRATION_PICTURES = "calibration.png"
MASKED_PICTURE = "masked.png"
"""One digit, whose lower half is to be painted anew."""
QUANTIZED_NAME = "small_flux-nvfp4"
MERGED_NAME = "small_flux-lora-nvfp4"
ENGINE = f"{QUANTIZED_NAME}/sm120"

_CHECKPOINTS = {
    "flux1-fill-dev.safetensors": FILL,
    "flux1-canny-dev.safetensors": CONTROL,
    "flux1-depth-dev.safetensors": CONTROL,
    "flux1-schnell.safetensors": SCHNELL,
}
"""What stands for a checkpoint; for all others, FLUX.1-dev's small form."""

# node type -> inputs that must name the small model's files or fit its size
_CHANGES: dict[str, dict[str, object]] = {
    "CLIPTextEncode": {"text": "a handwritten digit five"},
    # of random weights
    "ControlNetApplyAdvanced": {"strength": 0.1},
    "ControlNetLoader": {"control_net_name": "union.safetensors"},
    "EmptySD3LatentImage": {"width": PICTURE_SIZE, "height": PICTURE_SIZE},
    "FluxFP4QuantizeModel": {"name": MERGED_NAME},
    "FluxGuidance": {"guidance": GUIDANCE},
    "LoraLoaderModelOnly": {"lora_name": LORA},
    "VAELoader": {"vae_name": VAE},
}

# what works at a size of its own becomes what scales to that of the small model
_SCALED = {
    "class_type": "ImageScale",
    "inputs": {
        "upscale_method": "area",
        "width": PICTURE_SIZE,
        "height": PICTURE_SIZE,
        "crop": "disabled",
    },
}


def write_calibration_pictures(input_folder: Path) -> None:
    """Write one picture of each digit into a single file, which LoadImage reads as a batch."""
    frames = _digits()
    path = input_folder / CALIBRATION_PICTURES
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)


def write_masked_picture(input_folder: Path) -> None:
    """Write a digit with a mask, as the mask editor stores it."""
    picture = _digits()[5]
    alpha = Image.new("L", picture.size, 255)
    alpha.paste(0, (0, PICTURE_SIZE // 2, PICTURE_SIZE, PICTURE_SIZE))
    picture.putalpha(alpha)
    picture.save(input_folder / MASKED_PICTURE)


def _digits() -> list[Image.Image]:
    from small_model.digits import colour, load_ink

    ink, labels = load_ink()
    first = [int((labels == digit).nonzero()[0]) for digit in range(10)]
    pictures = (colour(ink[first]) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in pictures]


def for_small_model(workflow: ApiWorkflow) -> ApiWorkflow:
    """Return a copy that loads the small model's files and works at its size and on its subject.

    FLUX's two text encoders become the one that the small model was trained with: T5-XXL has no
    small form that ComfyUI would detect.
    """
    result = copy.deepcopy(workflow)
    for node in result.values():
        if node["class_type"] == "DualCLIPLoader":
            node["class_type"] = "CLIPLoader"
            node["inputs"] = {"clip_name": TEXT_ENCODER, "type": "stable_diffusion"}
        if node["class_type"] == "FluxKontextImageScale":
            node["class_type"] = _SCALED["class_type"]
            node["inputs"] |= _SCALED["inputs"]
        node["inputs"].update(_CHANGES.get(node["class_type"], {}))
        node["inputs"].update(_files(node))
    return result


def _files(node: dict[str, Any]) -> dict[str, str]:
    """Return the inputs of a node that name what a file of FLUX.1 becomes."""
    inputs, kind = node["inputs"], node["class_type"]
    if kind == "LoadImage":
        calibration = node["_meta"]["title"] in ("Calibration pictures", "Calibration picture")
        return {"image": CALIBRATION_PICTURES if calibration else MASKED_PICTURE}
    if kind == "UNETLoader":
        return {"unet_name": _CHECKPOINTS.get(inputs["unet_name"], DIFFUSION_MODEL)}
    if kind == "FluxFP4LoadEngine" and isinstance(inputs["engine"], str):
        return {"engine": ENGINE}
    if kind not in ("FluxFP4Quantize", "FluxFP4EngineFromCheckpoint"):
        return {}
    changed = {"checkpoint": _CHECKPOINTS.get(inputs["checkpoint"], DIFFUSION_MODEL)}
    if inputs.get("name") == "flux1-dev-nvfp4":
        changed["name"] = QUANTIZED_NAME
    return changed


def with_prompt(workflow: ApiWorkflow, text: str, seed: int) -> ApiWorkflow:
    """Return a copy that samples `text` from `seed`; calibration prompts stay as they are."""
    result = copy.deepcopy(workflow)
    saving = nodes_of_type(result, "SaveImage")
    for node_id in _ancestors(result, saving[0], stop="FluxFP4") if saving else ():
        inputs = result[node_id]["inputs"]
        if result[node_id]["class_type"] == "CLIPTextEncode":
            inputs["text"] = text
        for name in {"seed", "noise_seed"} & set(inputs):
            inputs[name] = seed
    return result


def with_original_model(workflow: ApiWorkflow) -> ApiWorkflow:
    """Return a copy that samples what was quantized: the checkpoint, or the MODEL with its LoRA."""
    result = copy.deepcopy(workflow)
    engine = the_loader(result)
    if merging := nodes_of_type(result, "FluxFP4QuantizeModel"):
        model = result[merging[0]]["inputs"]["model"]
        _replace_links(result, [engine, 0], model)
    else:
        checkpoint = result[engine]["inputs"].get("checkpoint", DIFFUSION_MODEL)
        result[engine] = {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": checkpoint, "weight_dtype": "default"},
        }
    kept = set(_ancestors(result, the_node(result, "SaveImage")))
    return {key: node for key, node in result.items() if key in kept}


def the_loader(workflow: ApiWorkflow) -> str:
    """Return the id of the only node that gives an engine as a MODEL."""
    kinds = ("FluxFP4LoadEngine", "FluxFP4EngineFromCheckpoint")
    (node_id,) = (node_id for kind in kinds for node_id in nodes_of_type(workflow, kind))
    return node_id


def _ancestors(workflow: ApiWorkflow, node_id: str, stop: str = "\0") -> Iterator[str]:
    """Yield a node and all it depends on, not going beyond node types that begin with `stop`."""
    waiting, seen = [node_id], set()
    while waiting:
        current = waiting.pop()
        if current in seen or workflow[current]["class_type"].startswith(stop):
            continue
        seen.add(current)
        yield current
        links = (value for value in workflow[current]["inputs"].values() if _is_link(value))
        waiting += [link[0] for link in links]


def _replace_links(workflow: ApiWorkflow, old: list[object], new: list[object]) -> None:
    for node in workflow.values():
        for name, value in node["inputs"].items():
            if value == old:
                node["inputs"][name] = new


def _is_link(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def stage_seconds(workflow: ApiWorkflow, node_seconds: dict[str, float]) -> dict[str, float]:
    """Add up the measured seconds by node type."""
    seconds: dict[str, float] = {}
    for node_id, value in node_seconds.items():
        name = workflow[node_id]["class_type"]
        seconds[name] = seconds.get(name, 0.0) + value
    return seconds


def needs_engine(workflow: ApiWorkflow) -> bool:
    """Return whether a workflow starts from a finished engine."""
    loaders = nodes_of_type(workflow, "FluxFP4LoadEngine")
    return any(isinstance(workflow[node]["inputs"]["engine"], str) for node in loaders)
