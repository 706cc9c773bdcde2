"""Where the small trained model is, and how it gets into a ComfyUI models folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pack_import import ROOT

DATA = ROOT / "tests" / "data" / "small_flux"

DIFFUSION_MODEL = "small_flux.safetensors"
VAE = "small_taef1.safetensors"
TEXT_ENCODER = "small_clip_l.safetensors"


def text_encoder() -> Path:
    """Return the generated text encoder, which is too large to commit; made once per checkout."""
    path = ROOT / ".cache" / TEXT_ENCODER
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        script = ROOT / "tests" / "tools" / "make_text_encoder.py"
        subprocess.run([sys.executable, str(script), str(path)], check=True)
    return path


def link_models(base: Path) -> None:
    """Link the small model's three files into `<base>/models`.

    The names are links to files, not to folders: ComfyUI lists both, and what the nodes write
    beside a model stays inside `base`.
    """
    sources = {
        Path("diffusion_models", DIFFUSION_MODEL): DATA / DIFFUSION_MODEL,
        Path("vae", VAE): DATA / VAE,
        Path("text_encoders", TEXT_ENCODER): text_encoder(),
    }
    for name, source in sources.items():
        link = base / "models" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(source)
