"""How fast quantization is against a plain copy of the same file, and what takes its time.

    python benchmarks/packing.py                    all rows, three rounds in turns
    python benchmarks/packing.py --whole            the copy and the quantization only
    python benchmarks/packing.py --folder /dev/shm  on another disk, or in memory

One double and two single blocks of FLUX.1-dev's width with random weights, 1.4 GB in bf16, and the
statistics of a small calibration that is not measured. Everything is in a temporary folder of at
most 4 GB that is deleted at the end. Before each copy and each quantization the system is told to
forget the file's pages (where it can be: Linux); both end with an fsync. Parts run alone, with the
file in the cache; the first three contain each other. GB/s are always of the whole source file's
bytes, so parts can be compared.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from blake3 import blake3

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "tools"))

from pack_import import register_pack  # noqa: E402

register_pack()

from flux_fp4.quant.block_quantizer import measured_block  # noqa: E402
from flux_fp4.quant.calibration import Conditioning, rectified_flow_samples  # noqa: E402
from flux_fp4.quant.flux.config import block_linears  # noqa: E402
from flux_fp4.quant.linear_quantizer import quantize_linear  # noqa: E402
from flux_fp4.quant.nvfp4 import quantize_weight  # noqa: E402
from flux_fp4.quant.nvfp4_scales import global_scale_from_amax, largest_value_scale  # noqa: E402
from flux_fp4.quant.quantize import quantize_checkpoint  # noqa: E402
from flux_fp4.quant.recipe import QuantizeOptions, named_recipe  # noqa: E402
from flux_fp4.quant.row_parallel import for_row_chunks  # noqa: E402
from flux_fp4.quant.sources.source import open_source  # noqa: E402
from flux_fp4.quant.stack import (  # noqa: E402
    block_statistics,
    block_with_weights,
    collect_statistics,
    compute_dtype,
)
from flux_fp4.quant.statistics_files import StatisticsFolder  # noqa: E402
from full_size import FLUX1_DEV, write_source  # noqa: E402
from tiny_flux import ignore_progress  # noqa: E402

CONFIG = FLUX1_DEV.model_copy(update={"depth": 1, "depth_single_blocks": 2})
OPTIONS = QuantizeOptions(recipe=named_recipe("nvfp4-max"))
COPY, QUANTIZE = "plain copy of the file", "quantize with `nvfp4-max`"
CHUNK = 8 << 20


def samples():
    """Return two samples of 64 image and 32 text tokens: random weights need no better ones."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 16, 16, generator=generator)
    context = torch.randn(1, 32, CONFIG.context_in_dim, generator=generator)
    pooled = torch.randn(1, CONFIG.vec_in_dim, generator=generator)
    return rectified_flow_samples(latents, [Conditioning(context, pooled, 3.5)], 1, seed=0)


def forget(path: Path) -> None:
    """Have the system drop a file's pages; files in memory keep them."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Benchmark:
    """Everything that is measured, over one source in a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "source.safetensors"
        write_source(self.path, CONFIG)
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        self.source, self.samples = open_source(self.path), samples()
        self.statistics = StatisticsFolder(
            folder / "statistics", self.source.digest(), self.samples.digest()
        )
        collect_statistics(
            self.source, self.samples, self.statistics, ignore_progress, "cpu", compute_dtype("cpu")
        )
        self.seconds: dict[str, list[tuple[float, float]]] = {}

    def measure(self, name: str, work: Callable[[], object]) -> None:
        """Add one measurement: seconds, and CPU seconds of all threads."""
        started, cpu = time.perf_counter(), time.process_time()
        work()
        found = (time.perf_counter() - started, time.process_time() - cpu)
        self.seconds.setdefault(name, []).append(found)

    def copy(self) -> None:
        """Copy the file in pieces of 8 MB."""
        with self.path.open("rb") as source, (self.folder / "copy").open("wb") as target:
            shutil.copyfileobj(source, target, CHUNK)
            target.flush()
            os.fsync(target.fileno())

    def quantize(self) -> None:
        """Quantize as a user does whose calibration is done."""
        result = self.folder / "result" / "result.safetensors"
        quantize_checkpoint(
            self.source, result, self.samples, OPTIONS, self.folder / "statistics", ignore_progress
        )

    def whole(self) -> None:
        """Measure the copy and the quantization."""
        forget(self.path)
        self.measure(COPY, self.copy)
        (self.folder / "copy").unlink()
        forget(self.path)
        self.measure(QUANTIZE, self.quantize)
        shutil.rmtree(self.folder / "result")

    def parts(self) -> None:
        """Measure the parts of a quantization, over all blocks."""
        for block in CONFIG.block_names:
            tensors = self.source.submodule(block)
            weights = [tensors[f"{linear}.weight"] for linear in block_linears(block)]
            self.measure(f"{block}: read and upcast", lambda w=weights: [upcast(x) for x in w])
            self.measure(f"{block}: the same and scales", lambda w=weights: [scaled(x) for x in w])
            self.measure(
                f"{block}: the same, rounding and packing",
                lambda w=weights: [quantize_weight(x, "weight") for x in w],
            )
            self._report_and_output(block, tensors)

    def _report_and_output(self, block: str, tensors: dict[str, torch.Tensor]) -> None:
        statistics = block_statistics(self.statistics, block)
        linears = block_linears(block)
        written = {
            f"{linear}.{part}": tensor
            for linear in linears
            for part, tensor in quantize_linear(
                linear,
                tensors[f"{linear}.weight"],
                None,
                statistics.linears[linear],
                OPTIONS,
                "nvfp4",
            ).items()
        }
        module = block_with_weights(block, CONFIG, tensors, report_type())
        self.measure(
            f"{block}: SQNR report",
            lambda: measured_block(
                block, module, dict(written), statistics, dict.fromkeys(linears, "nvfp4")
            ),
        )
        kept = {n: t for n, t in tensors.items() if n.removesuffix(".weight") not in linears}
        data = [
            tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            for tensor in (*written.values(), *kept.values())
        ]
        self.measure(f"{block}: digests", lambda: [blake3(part) for part in data])
        self.measure(f"{block}: writing", lambda: self._write(data))

    def _write(self, data: list[memoryview]) -> None:
        path = self.folder / "written"
        with path.open("wb") as file:
            for part in data:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        path.unlink()

    def medians(self) -> dict[str, tuple[float, float]]:
        """Return seconds and CPU seconds by row; parts are summed over the blocks."""
        rows: dict[str, tuple[float, float]] = {}
        for name, found in self.seconds.items():
            row = name.rpartition(": ")[2]
            before = rows.get(row, (0.0, 0.0))
            rows[row] = (
                before[0] + median(seconds for seconds, _ in found),
                before[1] + median(cpu for _, cpu in found),
            )
        return rows


def report_type() -> torch.dtype:
    """Return the type that a quantization measures its report in."""
    from flux_fp4.quant import stack

    return stack.report_dtype("cpu", OPTIONS.recipe)


def upcast(weight: torch.Tensor) -> None:
    """Turn a weight into fp32, piece by piece as packing does."""
    for_row_chunks(lambda chunk: weight[chunk].float(), weight.shape, weight.device)


def scaled(weight: torch.Tensor) -> None:
    """Compute the block scales of a weight."""
    global_scale = global_scale_from_amax(torch.stack(torch.aminmax(weight)).abs().max())

    def scales(chunk: slice) -> None:
        largest_value_scale(weight[chunk].float().abs(), global_scale)

    for_row_chunks(scales, weight.shape, weight.device)


def table(benchmark: Benchmark) -> str:
    """Return the rows as Markdown."""
    rows, size = benchmark.medians(), benchmark.path.stat().st_size
    lines = [
        "| | seconds | CPU seconds | GB/s of source | of a plain copy |",
        "|---|---|---|---|---|",
    ]
    copied = rows[COPY][0]
    for name, (seconds, cpu) in rows.items():
        lines.append(
            f"| {name} | {seconds:.2f} | {cpu:.2f} | {size / seconds / 1e9:.2f} "
            f"| {copied / seconds:.0%} |"
        )
    return "\n".join(lines)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="no parts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        benchmark = Benchmark(Path(folder))
        for _ in range(arguments.rounds):
            benchmark.whole()
            if not arguments.whole:
                benchmark.parts()
        size = benchmark.path.stat().st_size
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
        print(
            f"{size / 1e9:.2f} GB in {arguments.folder or tempfile.gettempdir()}, torch threads: "
            f"{torch.get_num_threads()}, load average {load:.1f}, {arguments.rounds} rounds\n"
        )
        print(table(benchmark))


if __name__ == "__main__":
    main()
