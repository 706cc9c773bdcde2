"""What each recipe does to the small trained model, as a table.

    python benchmarks/quality_table.py [rows]   measure rows, or all, and print the table
    python benchmarks/quality_table.py --list   names of the rows

Every row is measured once and kept in .cache/quality; delete its file to measure it again. The
model is emulated in torch, block by block as plans compute. Pictures are drawn from the same noise
for all rows; nothing of a recipe was chosen by them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "tools"))

from pack_import import register_pack  # noqa: E402

register_pack()

import small_model_files  # noqa: E402
from comfy_in_process import import_comfyui  # noqa: E402

import_comfyui()

from flux_fp4.quant.flux.config import block_linears  # noqa: E402
from flux_fp4.quant.flux.model import Flux  # noqa: E402
from flux_fp4.quant.quality.distributions import (  # noqa: E402
    frechet_distance,
    kernel_distance,
)
from flux_fp4.quant.quantize import quantize_checkpoint  # noqa: E402
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint  # noqa: E402
from flux_fp4.quant.recipe import QuantizeOptions, named_recipe  # noqa: E402
from flux_fp4.quant.sources.source import open_source  # noqa: E402
from flux_fp4.quant.sqnr import SQNR  # noqa: E402
from small_model.alternatives import comfy_kitchen_model  # noqa: E402
from small_model.classifier import DigitClassifier  # noqa: E402
from small_model.digits import PROMPTS, ink_of  # noqa: E402
from small_model.samples import TIMESTEPS, Digits  # noqa: E402
from small_model.sampling import (  # noqa: E402
    TEXT_TOKENS,
    Decoder,
    original_model,
    quantized_model,
    sample,
    velocity,
)

FOLDER = ROOT / ".cache" / "quality"

CALIBRATION = range(128)
"""Pictures that recipes see; training learns from 112 of them and is judged by 16."""

HELD_OUT = range(1537, 1793)
"""Pictures that no recipe sees, for the velocity. The transformer was trained on them too."""

PER_PROMPT = 100
SEED = 4321


@dataclass(frozen=True)
class Row:
    """One way to quantize."""

    recipe: str
    fp8_attention: bool = True
    modulation: str = "bf16"

    @property
    def name(self) -> str:
        """As the table shows it."""
        parts = [self.recipe]
        parts += [] if self.fp8_attention else ["bf16 attention"]
        parts += [] if self.modulation == "bf16" else [f"{self.modulation} modulation"]
        return ", ".join(parts)


COMFY_KITCHEN = "comfy_kitchen"

ROWS = (
    Row(COMFY_KITCHEN, fp8_attention=False),
    Row("nvfp4-max"),
    Row("nvfp4-mse"),
    Row("nvfp4-awq"),
    Row("nvfp4-svdquant-r16"),
    Row("nvfp4-svdquant-r32"),
    Row("nvfp4-svdquant-r64"),
    Row("nvfp4-fp8mix"),
    Row("auto"),
    Row("nvfp4-qat"),
    Row("fp8"),
    Row("nvfp4-max", fp8_attention=False),
    Row("nvfp4-qat", fp8_attention=False),
    Row("nvfp4-max", modulation="fp8"),
    Row("nvfp4-max", modulation="nvfp4"),
)

ORIGINAL = "original"


@dataclass(frozen=True)
class Result:
    """What was measured of one model.

    Attributes:
        velocity_db: SQNR of the velocity on held-out pictures; None for the original.
        loss: Mean squared error of the velocity against that of the flow, on the same pictures.
        fid: Of the pictures against real ones, on the classifier's features.
        kid: As ``fid``, times 1,000.
        right: Share of pictures that the classifier reads as the digit of their prompt.
        confidence: Mean probability that it gives that digit.
        plan_bytes: Of everything that goes into plans.
        extra_operations: Multiplications beside the Linears' own, in parts of those.
        seconds: That quantization took, calibration included.
    """

    velocity_db: float | None
    loss: float
    fid: float
    kid: float
    right: float
    confidence: float
    plan_bytes: int
    extra_operations: float
    seconds: float


class Bench:
    """The model, its pictures and what rows are compared with."""

    def __init__(self) -> None:
        self.digits = Digits.load()
        data = small_model_files.DATA
        self.source = open_source(data / small_model_files.DIFFUSION_MODEL)
        self.decoder = Decoder(data / small_model_files.VAE)
        self.classifier = DigitClassifier(self.digits.ink, self.digits.labels)
        self.real = self.classifier.features(self.digits.ink)
        self.original = original_model(self.source)

    def quantized(self, row: Row) -> tuple[QuantizedCheckpoint, float]:
        """Quantize as a user would; return the checkpoint and the seconds."""
        samples = self.digits.samples(CALIBRATION, seed=0, text_tokens=TEXT_TOKENS)
        options = QuantizeOptions(
            recipe=named_recipe(row.recipe),
            fp8_attention=row.fp8_attention,
            modulation=row.modulation,  # type: ignore[arg-type]
        )
        name = row.name.replace(", ", "-").replace(" ", "-")
        started = time.monotonic()
        checkpoint = quantize_checkpoint(
            self.source,
            FOLDER / name / f"{name}.safetensors",
            samples,
            options,
            FOLDER / "statistics",
            lambda phase, done, total: None,
            dtype=torch.float32,
        )
        return checkpoint, time.monotonic() - started

    def result(self, row: Row | None) -> Result:
        """Measure a row; None measures the original."""
        size, extra, seconds, model = 0, 0.0, 0.0, self.original
        if row is not None and row.recipe == COMFY_KITCHEN:
            model, size = comfy_kitchen_model(self.source)
        elif row is not None:
            checkpoint, seconds = self.quantized(row)
            model = quantized_model(self.source, checkpoint)
            size, extra = plan_bytes(checkpoint), extra_operations(checkpoint)
        db, loss = self._velocity(model)
        pictures = self._pictures(model)
        features = self.classifier.features(pictures)
        labels = torch.arange(len(PROMPTS)).repeat_interleave(PER_PROMPT)
        probability = self.classifier.probabilities(pictures)
        return Result(
            velocity_db=None if row is None else db,
            loss=loss,
            fid=frechet_distance(self.real, features).value,
            kid=1000 * kernel_distance(self.real, features).value,
            right=(probability.argmax(1) == labels).double().mean().item(),
            confidence=probability[range(len(labels)), labels].mean().item(),
            plan_bytes=size,
            extra_operations=extra,
            seconds=seconds,
        )

    def _velocity(self, model: Flux) -> tuple[float, float]:
        generator, ratio, loss = torch.Generator().manual_seed(99), SQNR(), 0.0
        chosen = torch.tensor(HELD_OUT)
        for level in range(TIMESTEPS):
            x0 = self.digits.latents[chosen]
            noise = torch.randn(x0.shape, generator=generator)
            t = torch.full((len(chosen),), (level + 0.5) / TIMESTEPS)
            x = torch.lerp(x0, noise, t[:, None, None, None])
            expected = velocity(self.original, x, t, self.digits.labels[chosen], self.digits)
            actual = velocity(model, x, t, self.digits.labels[chosen], self.digits)
            ratio.add(expected, actual)
            loss += functional.mse_loss(actual, noise - x0).item() / TIMESTEPS
        return ratio.db, loss

    def _pictures(self, model: nn.Module) -> Tensor:
        labels = torch.arange(len(PROMPTS)).repeat_interleave(PER_PROMPT)
        latents = sample(model, labels, SEED, self.digits)  # type: ignore[arg-type]
        return ink_of(torch.stack(list(self.decoder.pictures(latents))))


def plan_bytes(checkpoint: QuantizedCheckpoint) -> int:
    """Count the bytes of all Linears in plans."""
    blocks = ("double_blocks.", "single_blocks.")
    return sum(
        tensor.length
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(blocks) and "mod" not in name
    )


def extra_operations(checkpoint: QuantizedCheckpoint) -> float:
    """Return the operations of low-rank branches in parts of the Linears' own."""
    own = extra = 0
    for block in checkpoint.metadata.block_names:
        for linear in (f"{block}.{part}" for part in block_linears(block)):
            rows, columns = checkpoint.linear_shape(linear)
            own += rows * columns
            branch = checkpoint.tensors.get(f"{linear}.svd_down")
            extra += 0 if branch is None else branch.shape[0] * (rows + columns)
    return extra / own


def stored(name: str) -> Path:
    """Return where a row's result is kept."""
    return FOLDER / f"{name.replace(', ', '-').replace(' ', '-')}.json"


def table() -> list[str]:
    """Return the lines of the table, of all rows that were measured."""
    lines = [
        "| recipe | velocity | flow loss | FID | KID x 1000 | digits read | confidence "
        "| in plans | extra operations | seconds |",
        "|---" * 10 + "|",
    ]
    for name in (ORIGINAL, *(row.name for row in ROWS)):
        if not stored(name).is_file():
            continue
        found = Result(**json.loads(stored(name).read_text()))
        db = "" if found.velocity_db is None else f"{found.velocity_db:.2f} dB"
        size = f"{found.plan_bytes / 1e6:.2f} MB" if found.plan_bytes else ""
        lines.append(
            f"| {name} | {db} | {found.loss:.4f} | {found.fid:.3f} | {found.kid:.2f} | "
            f"{found.right:.1%} | {found.confidence:.3f} | {size} | {found.extra_operations:.1%} | "
            f"{found.seconds:.0f} |"
        )
    return lines


def measure(rows: Sequence[Row | None]) -> None:
    """Measure rows that were not measured before."""
    waiting = [row for row in rows if not stored(row.name if row else ORIGINAL).is_file()]
    bench = Bench() if waiting else None
    FOLDER.mkdir(parents=True, exist_ok=True)
    for row in waiting:
        assert bench is not None
        name = row.name if row else ORIGINAL
        result = bench.result(row)
        stored(name).write_text(json.dumps(asdict(result)))
        print(name, result, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="row")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(row.name for row in ROWS))
        return
    chosen = [row for row in ROWS if not arguments.rows or row.name in arguments.rows]
    measure([None, *chosen])
    print("\n".join(table()))


if __name__ == "__main__":
    main()
