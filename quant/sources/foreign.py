"""Files that people mistake for a FLUX checkpoint, and what to do with each instead."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..errors.sources import DamagedCheckpointError, UnknownCheckpointError

_HEAD_BYTES = 512

_CHOOSE_ANOTHER = "Choose a FLUX diffusion model in 'Quantize FLUX to FP4'."
_GET_BF16 = "Choose the bf16 or FP8 safetensors file of the same model."

_MAGICS: tuple[tuple[re.Pattern[bytes], str, str], ...] = (
    (re.compile(rb"GGUF"), "it is a GGUF file", _GET_BF16),
    (
        re.compile(rb"PK\x03\x04|\x80[\x02-\x05]"),
        "it is a pickle file (.ckpt, .pt, .bin), which can run code when it is opened",
        "Choose the safetensors file of the same model.",
    ),
    (
        re.compile(rb"version https://git-lfs"),
        "it is a Git LFS pointer, not the file itself",
        "Run 'git lfs pull' in its repository, or download the file.",
    ),
    (
        re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE),
        "it cannot be read as safetensors: it is a web page, as a failed download leaves behind",
        "Download it again, signed in where the model asks for it.",
    ),
)
"""Start of the file, what it is, what to do."""

_MERGE = "Merge it into a FLUX checkpoint first, save that and choose it."

_MARKERS: tuple[tuple[str, str, str], ...] = (
    (r"\.lora_|lora_unet_|lora_te|\.hada_w|\.lokr_w|\.oft_", "it is a LoRA", _MERGE),
    (
        r"\.qweight$|\.wscales$|\.smooth_factor|\.svdquant_lora_",
        "its weights are quantized by SVDQuant (Nunchaku or ModelOpt)",
        _GET_BF16,
    ),
    (
        r"\.quant_state\.bitsandbytes|\.weight\.absmax$",
        "its weights are quantized by bitsandbytes (NF4 or INT8)",
        _GET_BF16,
    ),
    (
        r"(^|\.)controlnet_|(^|\.)input_hint_block\.|(^|\.)control_add_embedding",
        "it is a ControlNet",
        "Load it with ComfyUI's 'Load ControlNet Model'.",
    ),
    (
        r"ip_adapter|(^|\.)image_proj\.|(^|\.)redux_(up|down)\.",
        "it is an IP-adapter or FLUX Redux",
        "Load it with ComfyUI's 'Load Style Model'.",
    ),
    (r"(^|\.)distilled_guidance_layer\.", "it is Chroma, not FLUX", _CHOOSE_ANOTHER),
    (
        r"individual_token_refiner|(^|\.)byt5_in\.|img_attn_qkv\.",
        "it is Hunyuan, not FLUX",
        _CHOOSE_ANOTHER,
    ),
    (r"(img|txt)_mlp\.gate_proj\.", "it is Ovis-Image or LongCat-Image, not FLUX", _CHOOSE_ANOTHER),
    (r"(^|\.)joint_blocks\.|(^|\.)pos_embed\.proj\.", "it is SD3 or PixArt", _CHOOSE_ANOTHER),
    (r"joint_transformer_blocks\.", "it is AuraFlow", _CHOOSE_ANOTHER),
    (r"(^|\.)noise_refiner\.|cap_embedder\.", "it is Z-Image or Lumina", _CHOOSE_ANOTHER),
    (r"transformer_blocks\.\d+\.(img|txt)_mod\.", "it is Qwen-Image", _CHOOSE_ANOTHER),
    (r"(^|\.)double_stream_blocks\.", "it is HiDream", _CHOOSE_ANOTHER),
    (r"(^|\.)patchify_proj\.", "it is LTX-Video", _CHOOSE_ANOTHER),
    (r"(^|\.)blocks\.\d+\.(cross_attn|self_attn|attn2)\.", "it is Wan or Cosmos", _CHOOSE_ANOTHER),
    (
        r"(^|\.)input_blocks\.\d|(^|\.)down_blocks\.\d+\.attentions\.\d+\.transformer_blocks",
        "it is a UNet (Stable Diffusion 1, 2 or XL)",
        _CHOOSE_ANOTHER,
    ),
    (
        r"(^|\.)(de|en)coder\.(conv_in|mid_block|up_blocks|down_blocks|mid\.|up\.|down\.)",
        "it is a VAE",
        "Load it with ComfyUI's 'Load VAE'.",
    ),
    (
        r"(^|\.)encoder\.block\.\d",
        "it is a T5 text encoder",
        "Load it with ComfyUI's 'Load CLIP (Dual)'.",
    ),
    (
        r"(^|\.)text_model\.|(^|\.)transformer\.resblocks\.|text_projection",
        "it is a CLIP text encoder",
        "Load it with ComfyUI's 'Load CLIP (Dual)'.",
    ),
    (
        r"(^|\.)layers\.\d+\.(self_attn|mlp|attention)\.|(^|\.)embed_tokens\.|tekken_model",
        "it is a language model (Mistral or Qwen text encoder)",
        "Load it with ComfyUI's 'Load CLIP'.",
    ),
)
"""Pattern in a tensor's name, what the file is, what to do; the first that any name matches."""


def refuse_other_formats(file: Path, name: str) -> None:
    """Recognize by its first bytes a file that is no safetensors file.

    Args:
        file: What to look at.
        name: What the user chose, for errors.

    Raises:
        UnknownCheckpointError: It is of another format.
        DamagedCheckpointError: It is empty or cannot be opened.
    """
    try:
        with file.open("rb") as opened:
            head = opened.read(_HEAD_BYTES)
    except OSError as error:
        raise DamagedCheckpointError(name, f"'{file.name}': {error.strerror}") from error
    subject = "" if file.name == name else f"of its shard '{file.name}': "
    if not head:
        reason = f"{subject}it cannot be read as safetensors: the file is empty"
        raise DamagedCheckpointError(name, reason)
    # a header's length may begin with any bytes, those of a pickle included
    if head[8:9] == b"{":
        return
    for pattern, reason, next_step in _MAGICS:
        if pattern.match(head):
            raise UnknownCheckpointError(name, subject + reason, next_step=next_step)


def refuse_other_models(tensors: Iterable[str], name: str) -> None:
    """Recognize by its tensors' names a model that is no FLUX transformer.

    Args:
        tensors: Names of the tensors.
        name: What the user chose, for errors.

    Raises:
        UnknownCheckpointError: It is another model.
    """
    names = list(tensors)
    for pattern, reason, next_step in _MARKERS:
        search = re.compile(pattern).search
        if any(search(tensor) for tensor in names):
            raise UnknownCheckpointError(name, reason, next_step=next_step)
