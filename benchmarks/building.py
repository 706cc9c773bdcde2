"""Do the build processes keep the cores busy?

    python benchmarks/building.py                    two double and four single blocks
    python benchmarks/building.py --double 4 --single 8 --rounds 5

Blocks of FLUX.1-dev's width from random NVFP4 data in a temporary folder (0.2 GB per double block).
The weights' pages are dropped before each build where the system can do that (Linux), as after a
restart. `at work` is the time that build processes spent on blocks, of their number times the wall
time; the rest is their start, what comes before the first block, and the end, when there are fewer
blocks than processes. `busy` is their CPU time by wall time and cores: less than `at work` where
other programs run, whose part shows in `idle`, which is the machine's.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "tools"))

import full_size_blocks  # noqa: E402  # registers the pack
from flux_fp4.trt_runtime.builder import build_engine  # noqa: E402
from flux_fp4.trt_runtime.resources import AUTOMATIC, usable_cores  # noqa: E402
from flux_fp4.trt_runtime.spec import BuildSpec, ShapeProfile  # noqa: E402
from packing import forget  # noqa: E402
from tiny_flux import ignore_progress  # noqa: E402

SPEC = BuildSpec("tensorrt_rtx", ("sm120",), ShapeProfile(1))


def cpu_seconds(who: int) -> float:
    """Return user and system seconds of this process or of its ended children."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def measured(folder: Path, workers: int) -> dict[str, float]:
    """Build everything once."""
    shutil.rmtree(folder / SPEC.folder_name, ignore_errors=True)
    forget(folder / "nvfp4.safetensors")
    idle, children = psutil.cpu_times().idle, cpu_seconds(resource.RUSAGE_CHILDREN)
    own, started = cpu_seconds(resource.RUSAGE_SELF), time.monotonic()
    manifest = build_engine(folder, SPEC, ignore_progress, workers)
    seconds = time.monotonic() - started
    automatic = usable_cores()  # there is memory enough for the few that this builds
    built = cpu_seconds(resource.RUSAGE_CHILDREN) - children
    return {
        "seconds": seconds,
        "at work %": 100
        * sum(entry.build_seconds for entry in manifest.blocks)
        / seconds
        / (workers or automatic),
        "CPU s of processes": built,
        "CPU s of parent": cpu_seconds(resource.RUSAGE_SELF) - own,
        "busy %": 100 * built / seconds / usable_cores(),
        "idle %": 100 * (psutil.cpu_times().idle - idle) / seconds / (psutil.cpu_count() or 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--double", type=int, default=2)
    parser.add_argument("--single", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    full_size_blocks.CONFIG = full_size_blocks.CONFIG.model_copy(
        update={"depth": arguments.double, "depth_single_blocks": arguments.single}
    )
    counts = (1, AUTOMATIC)
    rows: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as root:
        folder = full_size_blocks.exported_folder(Path(root))
        for _ in range(arguments.rounds):
            for count in counts:
                rows[count].append(measured(folder, count))
    names = list(rows[AUTOMATIC][0])
    print(f"| processes | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for count, found in rows.items():
        cells = (f"{median(row[name] for row in found):.1f}" for name in names)
        label = f"automatic, {usable_cores()} cores" if count == AUTOMATIC else count
        print(f"| {label} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
