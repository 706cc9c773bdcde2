"""One optimization profile up to the largest picture, or one for each size of pictures?

    python benchmarks/profile_tiers.py FOLDER    writes 1.5 GB of random weights there first

Builds one block of each kind at FLUX.1-dev's size with one profile up to 4,608, 10,240 and 17,408
tokens, and with all three profiles in one plan: seconds, kernels, bytes, and activation memory as
the builder reports it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "tools"))

from pack_import import register_pack  # noqa: E402

register_pack()

from flux_fp4.trt_runtime.build_log import activation_bytes, layers_from_log  # noqa: E402
from flux_fp4.trt_runtime.plan import BuildJob, PlanFactory  # noqa: E402
from flux_fp4.trt_runtime.plan_build import block_job, profile_shapes  # noqa: E402
from flux_fp4.trt_runtime.signature import read_signature  # noqa: E402
from flux_fp4.trt_runtime.spec import BuildSpec, ShapeProfile  # noqa: E402
from full_size_blocks import CONFIG, exported_folder  # noqa: E402

TIERS = (4608, 10_240, 17_408)
TEXT_TOKENS = 512


class TieredFactory(PlanFactory):
    """Builds plans that hold a profile for every tier."""

    profiles: list[dict[str, Any]]

    def _config(self, builder: Any, job: BuildJob) -> Any:
        config = super()._config(builder, job)
        for shapes in self.profiles:
            profile = builder.create_optimization_profile()
            for name, bounds in shapes.items():
                profile.set_shape(name, *bounds)
            config.add_optimization_profile(profile)
        return config


def tier(tokens: int) -> ShapeProfile:
    """Return a profile from the smallest picture to this many tokens, tuned for the largest."""
    img = tokens - TEXT_TOKENS
    return ShapeProfile(opt_img_tokens=img, max_img_tokens=img, max_txt_tokens=TEXT_TOKENS)


def build(path: Path, factory: TieredFactory, tiers: tuple[int, ...]) -> str:
    """Build one ONNX file with a profile per tier; return a table row."""
    signature = read_signature(path)
    first, *others = (tier(tokens) for tokens in tiers)
    factory.profiles = [profile_shapes(signature, profile) for profile in others]
    spec = BuildSpec(profile=first)
    job = block_job(signature, path.with_suffix(".plan"), factory.backend, spec)
    started = time.monotonic()
    # without the lint, which knows plans with one profile only
    factory.messages.clear()
    plan = memoryview(factory._serialized(job)).cast("B")
    seconds, kernels = time.monotonic() - started, len(layers_from_log(factory.messages))
    activations = activation_bytes(factory.messages) / 1e6
    name = " + ".join(f"{tokens:,}" for tokens in tiers)
    return (
        f"| {signature.block} | {name} | {seconds:.1f} | {kernels} | {plan.nbytes / 1e6:.1f} "
        f"| {activations:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = exported_folder(parser.parse_args().folder)
    factory = TieredFactory("tensorrt_rtx", lambda message: None)
    print("| block | profiles up to | build, s | kernels | MB | activations, MB |")
    print("|---|---|---|---|---|---|")
    for block in CONFIG.block_names:
        for tiers in (*((tokens,) for tokens in TIERS), TIERS):
            print(build(folder / f"{block}.onnx", factory, tiers), flush=True)


if __name__ == "__main__":
    main()
