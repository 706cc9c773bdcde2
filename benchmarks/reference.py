"""Time and memory of the reference backend beside the plain emulation in torch, block by block.

    python benchmarks/reference.py FOLDER                      writes 0.2 GB of random weights there
    python benchmarks/reference.py FOLDER --earlier CHECKOUT   also the backend of another checkout

Every way is a process of its own, and they run in turns, so that a busy machine slows all alike.
Under `taskset -c 0` all have one core. Ratios are medians over the rounds; above 1 is faster than
torch. Memory is what a process holds after the last run of both blocks, beyond what it held before
it opened them (anonymous pages, Linux).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve()
TORCH, EARLIER = "torch", "earlier"
WAYS = {TORCH: None, "dequantized in each run": 0, "kept in fp32": 1 << 40}
"""What `kept_bytes` is; torch has none."""
SIZES = {"FLUX.1-dev": ((256, 64), (1024, 64)), "small model": ((16, 77),)}
"""Image and text tokens."""
ROUNDS = {"FLUX.1-dev": 3, "small model": 100}
BLOCKS = ("double_blocks.0", "single_blocks.0")


class Process:
    """A way to run blocks, in a child process."""

    def __init__(self, way: str, root: Path, folder: Path) -> None:
        command = [sys.executable, HERE, folder, "--worker", way, "--root", root]
        self._child = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, *words: object) -> float:
        """Send a request and return the number that is the answer."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        print(*words, file=self._child.stdin, flush=True)
        answer = self._child.stdout.readline()
        if not answer:
            sys.exit("a worker ended; its error stands above")
        return float(answer)

    def end(self) -> None:
        """Close its input, which ends it."""
        self._child.communicate()


def compare(name: str, folder: Path, roots: dict[str, Path]) -> list[str]:
    """Return the rows of one model: seconds as ratios, then memory."""
    processes = {way: Process(way, root, folder) for way, root in roots.items()}
    rows = []
    for block in BLOCKS:
        for img, txt in SIZES[name]:
            seconds: dict[str, list[float]] = {way: [] for way in processes}
            for turn in range(ROUNDS[name] + 1):
                for way, process in processes.items():
                    found = process.ask(block, img, txt)
                    if turn:  # the first one warms up
                        seconds[way].append(found)
            medians = {way: statistics.median(found) for way, found in seconds.items()}
            ratios = [f"{medians[TORCH] / median:.2f}" for median in medians.values()]
            kind = block.split("_")[0]
            rows.append(f"| {name}, {kind}, {img} + {txt} tokens | {' | '.join(ratios)} |")
    held = [f"{process.ask('memory') / 1e6:,.0f} MB" for process in processes.values()]
    rows.append(f"| {name}, memory of both blocks | {' | '.join(held)} |")
    for process in processes.values():
        process.end()
    return rows


def work(way: str, folder: Path) -> None:
    """Answer requests on the standard input until it ends."""
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import torch

    # libraries, and torch's threads
    inputs_of(folder / f"{BLOCKS[0]}.onnx", 256, 64)
    torch.ones(256, 256) @ torch.ones(256, 256)
    before = anonymous_bytes()
    run_by_block = torch_blocks(folder) if way == TORCH else reference_blocks(way, folder)
    for request in sys.stdin:
        words = request.split()
        if words == ["memory"]:
            print(anonymous_bytes() - before, flush=True)
            continue
        block, img, txt = words[0], int(words[1]), int(words[2])
        inputs = inputs_of(folder / f"{block}.onnx", img, txt)
        started = time.perf_counter()
        run_by_block[block](inputs)
        print(time.perf_counter() - started, flush=True)


def inputs_of(path: Path, img: int, txt: int) -> dict:
    import torch
    from flux_fp4.trt_runtime.signature import read_signature

    sizes = {"B": 1, "N": img, "T": txt, "S": img + txt}
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for spec in read_signature(path).inputs:
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape]
        inputs[spec.name] = torch.randn(shape, generator=generator)
    return inputs


def reference_blocks(way: str, folder: Path) -> dict[str, Callable]:
    import torch
    from flux_fp4.trt_runtime.reference import ReferenceExecutor

    # earlier ones have no such parameter
    options = {} if way == EARLIER else {"kept_bytes": WAYS[way]}
    executor = ReferenceExecutor(folder, **options)
    executor.load(torch.device("cpu"))
    return {block: lambda inputs, block=block: executor.run(block, inputs) for block in BLOCKS}


def torch_blocks(folder: Path) -> dict[str, Callable]:
    import torch
    from flux_fp4.quant.emulation import emulated_block
    from flux_fp4.quant.flux.blocks import block_from_config
    from flux_fp4.quant.onnx_export.contract import DOUBLE_MODULATION, SINGLE_MODULATION
    from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint

    (path,) = folder.glob("*.safetensors")
    checkpoint = QuantizedCheckpoint.read(path)

    def block_in_torch(name: str) -> Callable:
        with torch.device("meta"):
            block = block_from_config(name, checkpoint.metadata.config).requires_grad_(False)
        tensors = {
            key: tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            for key, tensor in checkpoint.block_tensors(name).items()
        }
        # quantized weights come by emulation, modulation is an input
        plain = block.state_dict().keys() & {key for key in tensors if not key.endswith(".weight")}
        block.load_state_dict({key: tensors[key] for key in plain}, strict=False, assign=True)
        emulated = emulated_block(block, tensors)
        double = name.startswith("double")
        streams, mods = (
            (("img", "txt"), DOUBLE_MODULATION) if double else (("x",), SINGLE_MODULATION)
        )

        def run(inputs: dict) -> object:
            tokens = [inputs[stream] for stream in (*streams, "cos", "sin")]
            with torch.inference_mode():
                return emulated(*tokens, tuple(inputs[mod] for mod in mods))

        return run

    return {block: block_in_torch(block) for block in BLOCKS}


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line)


def small_folder(root: Path) -> Path:
    """Return a folder with two blocks of the small trained model's size, with random weights."""
    from flux_fp4.quant.onnx_export import export_blocks
    from full_size_blocks import CONFIG
    from mixed_checkpoint import linears_in_plans, save_mixed
    from tiny_flux import ignore_progress, random_flux

    path = root / "small" / "small.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        model = random_flux(CONFIG.model_copy(update={"hidden_size": 128, "num_heads": 1}))
        save_mixed(model, path, dict.fromkeys(linears_in_plans(model), "nvfp4"))
    export_blocks(path, ignore_progress)
    return path.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--earlier", type=Path, help="another checkout of this repository")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, default=HERE.parent.parent, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(options.root / "tests" / "tools"))
    from pack_import import register_pack

    register_pack()
    if options.worker:
        work(options.worker, options.folder)
        return
    from full_size_blocks import exported_folder

    folders = {
        "FLUX.1-dev": exported_folder(options.folder),
        "small model": small_folder(options.folder),
    }
    roots = dict.fromkeys(WAYS, options.root)
    if options.earlier:
        roots[EARLIER] = options.earlier.resolve()
    print(f"| block | {' | '.join(roots)} |\n|{'---|' * (1 + len(roots))}")
    for name, folder in folders.items():
        for row in compare(name, folder, roots):
            print(row, flush=True)


if __name__ == "__main__":
    main()
