"""Write the text encoder of the small test model: a CLIP-L with seeded random weights.

usage: python tests/tools/make_text_encoder.py OUT.safetensors

ComfyUI's CLIPLoader (type ``stable_diffusion``) reads the file, so CLIPTextEncode gives
``[1, 77, 768]`` conditioning and a ``[1, 768]`` pooled vector without any download. The file has
246 MB and is made in seconds, therefore it is generated where it is needed and never committed.

The small transformer was trained on exactly these weights. Only operations with one correct result
are used (integers of PCG64, one float32 product, one rounding to float16), so the file is the same
on every machine, and its digest is checked before the file gets its name.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

logger = logging.getLogger(__name__)

SEED = 20250

# The shape of CLIP ViT-L/14's text model (openai/clip-vit-large-patch14, config.json).
WIDTH = 768
MLP_WIDTH = 3072
LAYERS = 12
VOCABULARY = 49408
POSITIONS = 77

# With CLIP's own initialization (standard deviation 0.02) every position only sees its own token,
# and two prompts that differ in one word have nearly the same pooled vector. Attention with these
# gains looks at few tokens instead of averaging all of them: the mean cosine between the pooled
# vectors of the ten training prompts falls from 0.96 (all gains 1) to 0.83.
TOKEN_STD = 1.0
POSITION_STD = 0.25
ATTENTION_GAIN = 2.0
MLP_GAIN = 1.0

# SHA-256 over the names and bytes of all tensors, in the order of their names.
TENSOR_DIGEST = "04c6e045e6a78a095be879adef204460f77f0af54c3a85dd997d20b8f92daff8"

TensorPlan = tuple[str, tuple[int, ...], float]


class TextEncoderDigestError(Exception):
    """The generated weights are not the ones the small model was trained with.

    Attributes:
        found: digest of the generated tensors.
    """

    def __init__(self, found: str) -> None:
        super().__init__(
            f"The generated text encoder has the digest {found}; the small model was trained with "
            f"{TENSOR_DIGEST}. Train it again (tests/tools/train_small_model.py) or restore "
            "tests/tools/make_text_encoder.py."
        )
        self.found = found


def _linear(name: str, outputs: int, inputs: int, gain: float) -> Iterator[TensorPlan]:
    # The variance of a random Linear's output is that of its input times gain squared.
    yield f"{name}.weight", (outputs, inputs), gain / math.sqrt(inputs)
    yield f"{name}.bias", (outputs,), 0.0


def tensor_plans() -> Iterator[TensorPlan]:
    """Name, shape and standard deviation of every random or zero tensor, in drawing order."""
    yield "text_model.embeddings.token_embedding.weight", (VOCABULARY, WIDTH), TOKEN_STD
    yield "text_model.embeddings.position_embedding.weight", (POSITIONS, WIDTH), POSITION_STD
    for layer in range(LAYERS):
        prefix = f"text_model.encoder.layers.{layer}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{prefix}.self_attn.{projection}", WIDTH, WIDTH, ATTENTION_GAIN)
        yield from _linear(f"{prefix}.mlp.fc1", MLP_WIDTH, WIDTH, MLP_GAIN)
        yield from _linear(f"{prefix}.mlp.fc2", WIDTH, MLP_WIDTH, MLP_GAIN)


def norm_names() -> Iterator[str]:
    """Names of the LayerNorms, whose weight is one and whose bias is zero."""
    for layer in range(LAYERS):
        yield f"text_model.encoder.layers.{layer}.layer_norm1"
        yield f"text_model.encoder.layers.{layer}.layer_norm2"
    yield "text_model.final_layer_norm"


def _uniform(bits: np.random.PCG64, shape: tuple[int, ...], std: float) -> np.ndarray:
    """Uniform float16 values with the given standard deviation; 16 random bits per value."""
    count = math.prod(shape)
    words = bits.random_raw((count + 3) // 4).astype("<u8")
    integers = words.view("<i2")[:count].astype(np.float32)
    # A uniform variable on [-a, a] has the standard deviation a / sqrt(3).
    scale = np.float32(std * math.sqrt(3.0) / 32768.0)
    return (integers * scale).astype(np.float16).reshape(shape)


def random_clip_l() -> dict[str, np.ndarray]:
    """All tensors of the encoder, float16, with the names CLIPLoader detects as CLIP-L."""
    bits = np.random.PCG64(SEED)
    tensors = {}
    for name, shape, std in tensor_plans():
        tensors[name] = _uniform(bits, shape, std) if std else np.zeros(shape, np.float16)
    for name in norm_names():
        tensors[f"{name}.weight"] = np.ones(WIDTH, np.float16)
        tensors[f"{name}.bias"] = np.zeros(WIDTH, np.float16)
    tensors["text_projection.weight"] = np.eye(WIDTH, dtype=np.float16)
    return tensors


def tensor_digest(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names and bytes; independent of how safetensors lays out the file."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


def write_text_encoder(path: Path) -> None:
    """Write the encoder to ``path``; the file has this name only when it is complete.

    Raises:
        TextEncoderDigestError: the weights differ from those the small model was trained with.
    """
    tensors = random_clip_l()
    digest = tensor_digest(tensors)
    if digest != TENSOR_DIGEST:
        raise TextEncoderDigestError(digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, str(partial))
    os.replace(partial, path)
    logger.info("Wrote %s (%d bytes)", path, path.stat().st_size)


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="path of the safetensors file to write")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write_text_encoder(arguments.out)


if __name__ == "__main__":
    main()
