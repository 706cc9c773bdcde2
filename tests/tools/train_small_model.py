"""Train the small FLUX and its autoencoder on handwritten digits, then judge their pictures.

usage: python tests/tools/train_small_model.py --out DIR [--evaluate WEIGHTS]

DIR receives small_taef1.safetensors, small_flux.safetensors and contact_sheet.png. What is already
there is kept, so an interrupted run continues. With --evaluate nothing is trained: the weights in
the folder WEIGHTS are judged and only the contact sheet is written. Seeds, step counts and the
number of threads are fixed: the same machine writes the same bytes again. Another CPU may round
differently and ends at other, equally good weights. ComfyUI is found through COMFYUI_PATH.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import small_model_files
import torch
from comfy_in_process import import_comfyui
from pack_import import register_pack
from safetensors.torch import save_file

logger = logging.getLogger(__name__)

THREADS = 2
SEED = 7


def _train_autoencoder(path: Path) -> None:
    from small_model.autoencoder import (
        autoencoder_tensors,
        reconstruction_psnr,
        train_autoencoder,
    )
    from small_model.digits import load_ink

    ink, _ = load_ink()
    model = train_autoencoder(ink, SEED)
    logger.info("Autoencoder: PSNR %.1f dB", reconstruction_psnr(model, ink[:200]))
    save_file(autoencoder_tensors(model), path)


def _train_transformer(path: Path, text_encoder: Path) -> None:
    from small_model.autoencoder import latents_of
    from small_model.conditioning import encode_prompts
    from small_model.digits import PROMPTS, load_ink
    from small_model.transformer import train_transformer, training_set, transformer_tensors

    ink, labels = load_ink()
    context, pooled = encode_prompts(text_encoder, PROMPTS)
    data = training_set(latents_of(ink), labels, context, pooled)
    average = train_transformer(data, SEED, path.with_name("training_state.pt"))
    save_file(transformer_tensors(average), path)


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--evaluate", type=Path, metavar="WEIGHTS", help="only judge the weights in this folder"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(THREADS)
    import_comfyui()
    register_pack()

    weights: Path = arguments.evaluate or arguments.out
    arguments.out.mkdir(parents=True, exist_ok=True)
    transformer = weights / small_model_files.DIFFUSION_MODEL
    autoencoder = weights / small_model_files.VAE
    text_encoder = small_model_files.text_encoder()
    if arguments.evaluate is None:
        if not autoencoder.exists():
            _train_autoencoder(autoencoder)
        if not transformer.exists():
            _train_transformer(transformer, text_encoder)
    from small_model.evaluation import evaluate

    evaluate(transformer, autoencoder, text_encoder, arguments.out / "contact_sheet.png")


if __name__ == "__main__":
    main()
