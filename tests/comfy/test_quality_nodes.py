"""The comparing nodes in a real server: reports, pictures on the node, refusals."""

from __future__ import annotations

import json
from io import BytesIO
from typing import Any

import numpy as np
from comfy_server import ComfyClient
from PIL import Image
from small_model_files import DIFFUSION_MODEL, TEXT_ENCODER, VAE


def prompt(**compare_images: Any) -> dict[str, Any]:
    """Compare the small model with its own weights in FP8: along the trajectory, and pictures."""
    clip = {"clip_name": TEXT_ENCODER, "type": "stable_diffusion"}
    text = {"text": "a handwritten digit three", "clip": ["clip", 0]}
    empty = {"width": 64, "height": 64, "batch_size": 2}
    compared = {
        "reference": ["model", 0], "tested": ["tested", 0], "positive": ["text", 0],
        "latent": ["empty", 0], "seed": 3, "steps": 3, "sampler_name": "euler",
        "scheduler": "simple",
    }  # fmt: skip
    return {
        "model": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": DIFFUSION_MODEL, "weight_dtype": "default"},
        },
        "tested": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": DIFFUSION_MODEL, "weight_dtype": "fp8_e4m3fn"},
        },
        "clip": {"class_type": "CLIPLoader", "inputs": clip},
        "text": {"class_type": "CLIPTextEncode", "inputs": text},
        "vae": {"class_type": "VAELoader", "inputs": {"vae_name": VAE}},
        "empty": {"class_type": "EmptySD3LatentImage", "inputs": empty},
        "models": {"class_type": "FluxFP4CompareModels", "inputs": compared},
        **{
            name: {
                "class_type": "VAEDecode",
                "inputs": {"samples": ["models", output], "vae": ["vae", 0]},
            }
            for name, output in (("first", 2), ("second", 3))
        },
        "images": {
            "class_type": "FluxFP4CompareImages",
            "inputs": {"original": ["first", 0], "quantized": ["second", 0], **compare_images},
        },
        "json": {"class_type": "PreviewAny", "inputs": {"source": ["images", 2]}},
    }


def preview(client: ComfyClient, entries: list[dict[str, str]]) -> np.ndarray:
    (entry,) = entries
    assert entry["type"] == "temp"
    return np.asarray(Image.open(BytesIO(client.image(entry))))


def test_models_and_pictures_are_compared(client: ComfyClient) -> None:
    result = client.run(prompt())
    assert (result.status, result.error_message) == ("success", "")
    report = result.text("models")
    rows = report.splitlines()[-3:]
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]
    # weights in FP8: far better than FP4, far from exact
    velocities = [float(row.split()[2]) for row in rows]
    assert all(20 < value < 60 for value in velocities), report
    assert rows[0].split()[-1] == "exact"
    assert result.progress_texts("models")[-1] == report
    assert preview(client, result.previews("models")).shape[2] == 3
    pictures = result.text("images")
    assert "2 pictures of 'quantized', original 'original'" in pictures
    values = json.loads(result.text("json"))["values"]
    assert {value["metric"] for value in values} == {"psnr", "ssim"}
    assert all(len(value["values"]) == 2 for value in values)
    assert all(value["values"][0] > 20 for value in values if value["metric"] == "psnr")
    assert preview(client, result.previews("images")).std() > 5


def test_second_run_is_free(client: ComfyClient) -> None:
    client.run(prompt())
    assert client.run(prompt()).node_seconds == {}


def test_prompts_are_asked_for_before_anything_is_loaded(client: ComfyClient) -> None:
    result = client.run(prompt(clip_score=True))
    assert result.status == "error"
    assert "they are needed for CLIPScore" in result.error_message


def test_too_few_prompts_are_refused(client: ComfyClient) -> None:
    result = client.run(prompt(clip_score=True, prompts="one prompt"))
    assert "1 prompts for 2 pictures" in result.error_message


def test_missing_package_is_a_message_with_the_commands(client: ComfyClient) -> None:
    result = client.run(prompt(image_reward=True, prompts="one\ntwo"))
    assert result.status == "error"
    assert "ImageReward cannot be computed" in result.error_message
    assert "pip install image-reward" in result.error_message
