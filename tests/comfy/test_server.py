"""The test server is the real thing: stock nodes sample the small model, and prompts can fail."""

from __future__ import annotations

from io import BytesIO

import pytest
from comfy_server import ComfyClient, ComfyServer, ComfyServerError
from PIL import Image
from small_model_files import DIFFUSION_MODEL, TEXT_ENCODER, VAE


def stock_prompt(seed: int = 1, steps: int = 2) -> dict[str, dict[str, object]]:
    """Text to image with ComfyUI's own nodes on the unquantized small model."""
    return {
        "unet": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": DIFFUSION_MODEL, "weight_dtype": "default"},
        },
        "clip": {
            "class_type": "CLIPLoader",
            "inputs": {"clip_name": TEXT_ENCODER, "type": "stable_diffusion"},
        },
        "vae": {"class_type": "VAELoader", "inputs": {"vae_name": VAE}},
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": "3"}},
        "latent": {
            "class_type": "EmptySD3LatentImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1},
        },
        "sampler": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["unet", 0],
                "positive": ["text", 0],
                "negative": ["text", 0],
                "latent_image": ["latent", 0],
                "seed": seed,
                "steps": steps,
                "cfg": 1.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        },
        "decode": {
            "class_type": "VAEDecode",
            "inputs": {"samples": ["sampler", 0], "vae": ["vae", 0]},
        },
        "save": {
            "class_type": "SaveImage",
            "inputs": {"images": ["decode", 0], "filename_prefix": "stock"},
        },
    }


def test_stock_sampling_saves_an_image(client: ComfyClient) -> None:
    result = client.run(stock_prompt())
    assert (result.status, result.error_message) == ("success", "")
    (entry,) = result.images()
    image = Image.open(BytesIO(client.image(entry)))
    assert image.size == (64, 64)
    assert result.node_seconds["sampler"] > 0


def test_interrupt_while_sampling_ends_the_prompt(client: ComfyClient) -> None:
    def interrupt_at_first_step(event: dict[str, object]) -> None:
        if event["type"] == "progress":
            client.interrupt()

    result = client.run(stock_prompt(seed=2, steps=2000), on_event=interrupt_at_first_step)
    assert result.status == "interrupted"


def test_unknown_model_file_is_refused_with_its_name(client: ComfyClient) -> None:
    prompt = stock_prompt(seed=3)
    prompt["unet"]["inputs"] = {"unet_name": "absent.safetensors", "weight_dtype": "default"}
    with pytest.raises(ComfyServerError, match=r"absent\.safetensors"):
        client.run(prompt)


def test_pack_is_imported_without_failure(server: ComfyServer) -> None:
    assert "IMPORT FAILED" not in server.log()
