"""Make a shipped workflow, written for the real FLUX.1-dev, run on the small model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

from api_workflow import ApiWorkflow, nodes_of_type, the_node
from PIL import Image
from small_lora import LORA
from small_model_files import DIFFUSION_MODEL, TEXT_ENCODER, VAE

PICTURE_SIZE = 64
"""Pixels; the size of the small model's training pictures."""
CALIBRATION_PICTURES = "calibration.png"
QUANTIZED_NAME = "small_flux-nvfp4"
MERGED_NAME = "small_flux-lora-nvfp4"

# node type -> inputs that must name the small model's files or fit its size
_CHANGES: dict[str, dict[str, object]] = {
    "CLIPTextEncode": {"text": "a handwritten digit five"},
    "EmptySD3LatentImage": {"width": PICTURE_SIZE, "height": PICTURE_SIZE, "batch_size": 1},
    "FluxFP4EngineFromCheckpoint": {"checkpoint": DIFFUSION_MODEL},
    "FluxFP4Quantize": {"checkpoint": DIFFUSION_MODEL, "name": QUANTIZED_NAME},
    "FluxFP4QuantizeModel": {"name": MERGED_NAME},
    "LoadImage": {"image": CALIBRATION_PICTURES},
    "LoraLoaderModelOnly": {"lora_name": LORA},
    "UNETLoader": {"unet_name": DIFFUSION_MODEL},
    "VAELoader": {"vae_name": VAE},
}


def write_calibration_pictures(input_folder: Path) -> None:
    """Write one picture of each digit into a single file, which LoadImage reads as a batch."""
    from small_model.digits import colour, load_ink

    ink, labels = load_ink()
    first = [int((labels == digit).nonzero()[0]) for digit in range(10)]
    pictures = (colour(ink[first]) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    frames = [Image.fromarray(picture) for picture in pictures]
    path = input_folder / CALIBRATION_PICTURES
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)


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
        node["inputs"].update(_CHANGES.get(node["class_type"], {}))
    return result


def with_prompt(workflow: ApiWorkflow, text: str, seed: int) -> ApiWorkflow:
    """Return a copy that samples `text` from `seed`; calibration prompts stay as they are."""
    result = copy.deepcopy(workflow)
    for node_id in _ancestors(result, the_node(result, "SaveImage"), stop="FluxFP4"):
        inputs = result[node_id]["inputs"]
        if result[node_id]["class_type"] == "CLIPTextEncode":
            inputs["text"] = text
        for name in {"seed", "noise_seed"} & set(inputs):
            inputs[name] = seed
    return result


def with_original_model(workflow: ApiWorkflow) -> ApiWorkflow:
    """Return a copy that samples what was quantized: the checkpoint, or the MODEL with its LoRA."""
    result = copy.deepcopy(workflow)
    engine = the_node(result, "FluxFP4LoadEngine")
    if merging := nodes_of_type(result, "FluxFP4QuantizeModel"):
        model = result[merging[0]]["inputs"]["model"]
        _replace_links(result, [engine, 0], model)
    else:
        result[engine] = {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": DIFFUSION_MODEL, "weight_dtype": "default"},
        }
    kept = set(_ancestors(result, the_node(result, "SaveImage")))
    return {key: node for key, node in result.items() if key in kept}


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


def has_full_pipeline(workflow: ApiWorkflow) -> bool:
    """Return whether a workflow quantizes rather than starts from an engine."""
    types = ("FluxFP4Quantize", "FluxFP4QuantizeModel")
    return any(nodes_of_type(workflow, class_type) for class_type in types)
