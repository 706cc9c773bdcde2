"""Prompts through ComfyUI's own text encoder code, exactly as CLIPTextEncode does it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import comfy.sd
import torch
from torch import Tensor


def encode_prompts(text_encoder: Path, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Encode prompts with the file of ``make_text_encoder.py``.

    Returns:
        Token states ``[P, 77, 768]`` and pooled vectors ``[P, 768]``, float32.
    """
    clip = comfy.sd.load_clip(
        ckpt_paths=[str(text_encoder)], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION
    )
    encoded = [
        clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True) for prompt in prompts
    ]
    # ComfyUI computes under inference mode; a clone can take part in training.
    return tuple(torch.cat(part).float().clone() for part in zip(*encoded, strict=True))
