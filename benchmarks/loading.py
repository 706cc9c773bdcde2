"""What is done on the CPU between "Load FLUX FP4 Engine" and the first block, by part.

    python benchmarks/loading.py              plans of 4 double and 8 single blocks, 1 GB
    python benchmarks/loading.py --rounds 5

The plans are random bytes of the size that FLUX.1-dev's have, with the manifest of a tiny engine
that is really built; so everything is measured but the library, which needs a GPU: deserialization,
contexts and the self-test are in the log of a real load. Beside it the PyTorch weights of as many
blocks (their modulation in bf16), copied from the mapped file as a model does. Each part is
compared with a plain read of the same bytes by 8 MB; `cold` is after the system was told to forget
the pages (Linux).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import torch
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "tools"))

from pack_import import register_pack  # noqa: E402

register_pack()

from flux_fp4.quant.onnx_export import export_blocks  # noqa: E402
from flux_fp4.trt_runtime.builder import build_engine  # noqa: E402
from flux_fp4.trt_runtime.digest import digest_of_file  # noqa: E402
from flux_fp4.trt_runtime.manifest import (  # noqa: E402
    MANIFEST,
    EngineManifest,
    check_engine,
    check_plan,
    check_plan_digest,
    load_manifest,
    write_manifest,
)
from flux_fp4.trt_runtime.spec import BuildSpec, ShapeProfile  # noqa: E402
from mixed_checkpoint import linears_in_plans, save_mixed  # noqa: E402
from packing import forget  # noqa: E402
from tiny_flux import TINY, ignore_progress, random_flux  # noqa: E402

SPEC = BuildSpec(profile=ShapeProfile(max_batch=2))
DOUBLE, SINGLE = 4, 8
PLAN_BYTES = {"double": 131_900_000, "single": 65_800_000}
"""5,007,777,940 bytes of 19 + 38 plans (docs/memory.md), a double block twice a single one."""
MODULATION = {"double": (12 * 3072, 3072), "single": (3 * 3072, 3072)}


def tiny_engine(folder: Path) -> Path:
    """Build an engine with as many blocks as there will be plans; return its folder."""
    config = TINY.model_copy(update={"depth": DOUBLE, "depth_single_blocks": SINGLE})
    model = random_flux(config)
    path = folder / "model" / "model.safetensors"
    path.parent.mkdir()
    save_mixed(model, path, dict.fromkeys(linears_in_plans(model), "nvfp4"))
    export_blocks(path, ignore_progress)
    build_engine(path.parent, SPEC, ignore_progress)
    return path.parent / SPEC.folder_name


def with_full_plans(engine_dir: Path) -> EngineManifest:
    """Replace the plans by random bytes of full size."""
    entries = []
    manifest = load_manifest(engine_dir)
    for entry in manifest.blocks:
        path = engine_dir / entry.file
        size = PLAN_BYTES[entry.kind]
        torch.randint(0, 256, (size,), dtype=torch.uint8).numpy().tofile(path)
        update = {"bytes": size, "digest": digest_of_file(path)}
        entries.append(entry.model_copy(update=update))
    manifest = manifest.model_copy(update={"blocks": tuple(entries)})
    write_manifest(engine_dir / MANIFEST, manifest)
    return manifest


def save_weights(path: Path, manifest: EngineManifest) -> None:
    """Write the modulation weights of the blocks."""
    shapes = {entry.block: MODULATION[entry.kind] for entry in manifest.blocks}
    save_file({n: torch.ones(shape, dtype=torch.bfloat16) for n, shape in shapes.items()}, path)


def read(paths: Iterable[Path]) -> None:
    """Read files by 8 MB."""
    buffer = bytearray(8 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def copy_weights(path: Path) -> None:
    """Copy every tensor out of the mapped file."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # a handle, not a dict
            file.get_tensor(name).clone()


def measured(engine_dir: Path, weights: Path) -> dict[str, float]:
    """Do everything once; return seconds by part."""
    seconds: dict[str, float] = {}

    def part(name: str, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        seconds[name] = time.perf_counter() - started

    manifest = load_manifest(engine_dir)
    plans = [engine_dir / entry.file for entry in manifest.blocks]
    for path in plans:
        forget(path)
    part("plain read of the plans, cold", lambda: read(plans))
    part("plain read of the plans, cached", lambda: read(plans))
    for path in plans:
        forget(path)
    part("Load: manifest", lambda: load_manifest(engine_dir))
    part("Load: ONNX files and sizes", lambda: check_engine(engine_dir, manifest, None))
    part(
        "Load: digests of plans, cold",
        lambda: [check_plan_digest(engine_dir, entry) for entry in manifest.blocks],
    )
    part(
        "first step: plans mapped, digests, cached",
        lambda: [check_plan(engine_dir, entry).close() for entry in manifest.blocks],
    )
    forget(weights)
    part("plain read of PyTorch weights, cold", lambda: read([weights]))
    forget(weights)
    part("Load: PyTorch weights copied, cold", lambda: copy_weights(weights))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as root:
        engine_dir = tiny_engine(Path(root))
        manifest = with_full_plans(engine_dir)
        weights = Path(root) / "weights.safetensors"
        save_weights(weights, manifest)
        plan_bytes = sum(entry.bytes for entry in manifest.blocks)
        found = [measured(engine_dir, weights) for _ in range(rounds)]
        weight_bytes = weights.stat().st_size
    print("| part | GB | seconds | GB/s | of a plain cold read |\n|---|---|---|---|---|")
    medians = {name: median(row[name] for row in found) for name in found[0]}
    for name, seconds in medians.items():
        size, plain = plan_bytes, medians["plain read of the plans, cold"]
        if "PyTorch" in name:
            size, plain = weight_bytes, medians["plain read of PyTorch weights, cold"]
        if "manifest" in name or "ONNX" in name:
            print(f"| {name} | | {seconds:.3f} | | |")
        else:
            row = f"{size / 1e9:.2f} | {seconds:.2f} | {size / seconds / 1e9:.2f}"
            print(f"| {name} | {row} | {plain / seconds:.0%} |")


if __name__ == "__main__":
    main()
