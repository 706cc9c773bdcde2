"""Every error is one readable paragraph whose fields rebuild it, as the worker's answers need."""

from __future__ import annotations

from pathlib import Path

import pytest
from flux_fp4.trt_runtime import errors
from flux_fp4.trt_runtime.errors import EngineError

ONNX = Path("models/flux/single_blocks.3.onnx")
ENGINE = Path("models/flux/sm120")
REBUILD = (
    'Set "if stale" of "Load FLUX FP4 Engine" to "rebuild" and queue again, or run "FLUX FP4 '
    'Engine Manager" with "rebuild stale" for all engines.'
)

EXAMPLES: list[tuple[EngineError, str]] = [
    (
        errors.BackendMissingError("tensorrt", "tensorrt>=11", "No module named 'tensorrt'"),
        "Backend 'tensorrt' needs the Python package 'tensorrt>=11', which does not import here "
        "(No module named 'tensorrt'). Install it into ComfyUI's Python with: "
        "python -m pip install 'tensorrt>=11'",
    ),
    (
        errors.BackendUnusableError("tensorrt_rtx", "no CUDA device: no driver"),
        "Backend 'tensorrt_rtx' cannot run here: no CUDA device: no driver. Choose backend "
        '"auto" or "reference" to run on the CPU.',
    ),
    (
        errors.FormatTargetError(
            "sm89", "the NVFP4 weights of 'single_blocks.3'", "sm120", "recipe 'fp8'"
        ),
        "Target 'sm89' cannot run the NVFP4 weights of 'single_blocks.3': that needs sm120. "
        "Choose such a target, or recipe 'fp8' in \"Quantize FLUX to FP4\".",
    ),
    (
        errors.ShapeProfileError("image", 6144, 64, 4096, "megapixels"),
        "This run needs 6144 image tokens; the engine takes 64 to 4096. Use fewer, or build again "
        'with "Build TensorRT Engine" and another "max megapixels".',
    ),
    (
        errors.BlockContractError(ONNX, "it has sparse weights"),
        "'single_blocks.3.onnx' is not a usable block ONNX: it has sparse weights. Export it "
        'again with "Export FLUX FP4 to ONNX".',
    ),
    (
        errors.BlocksMissingError(ENGINE.parent, ["double_blocks.1", "single_blocks.0"]),
        "Folder 'flux' lacks 2 block ONNX files (first: 'double_blocks.1.onnx'). Export the "
        'checkpoint again with "Export FLUX FP4 to ONNX".',
    ),
    (
        errors.BlocksMixedError(ENGINE.parent, "2 different values of 'depth'"),
        "The block ONNX files in 'flux' do not belong together: 2 different values of 'depth'. "
        'Export the checkpoint again with "Export FLUX FP4 to ONNX".',
    ),
    (
        errors.AdapterError("single_blocks.3", "linear1", "rank 600 is not within 1 to 512"),
        "The adapter for 'single_blocks.3.linear1' cannot be used: rank 600 is not within 1 to "
        "512.",
    ),
    (
        errors.VariantPlanMissingError(["double_blocks.0.lora", "single_blocks.3.lora"]),
        "2 plans for LoRA or attention masks are missing (first: 'double_blocks.0.lora'). Queue "
        "the workflow again to build them.",
    ),
    (
        errors.SelfTestError("single_blocks.0", 3.25, 10.0, ENGINE / "self_test_failed.json"),
        "The engine is not used: on this GPU block 'single_blocks.0' gives 3.2 dB against the "
        "reference, at least 10 dB are needed. Update the NVIDIA driver and build again with "
        "\"Build TensorRT Engine\". If it stays, report it with 'self_test_failed.json' from the "
        'engine\'s folder; until then choose backend "reference".',
    ),
    (
        errors.PlanValidityError("single_blocks.0", ["OLD_CUDA_DRIVER"]),
        "TensorRT refuses the plan of block 'single_blocks.0' on this machine: old cuda driver. "
        "Update the NVIDIA driver.",
    ),
    (
        errors.DiskFullError(ENGINE / "a.plan", 300, 20),
        "'a.plan' needs 300 bytes, but the disk takes no more (20 bytes free in 'sm120'). Free "
        "some space and run the step again; finished blocks are kept.",
    ),
    (
        errors.FileWriteError(ENGINE / "a.plan", "Read-only file system"),
        "'a.plan' cannot be written into the folder 'sm120': Read-only file system. Check that "
        "ComfyUI may write there and that the disk is in order, then run the step again; finished "
        "blocks are kept.",
    ),
    (
        errors.EngineBusyError(ENGINE),
        "'flux/sm120' is being built by another process. Nothing was changed; wait until that is "
        "done and try again.",
    ),
    (
        errors.EngineInUseError(ENGINE),
        "'flux/sm120' is open in a running ComfyUI. Nothing was changed; press 'Free model and "
        "node cache' there, or close it, and try again.",
    ),
    (
        errors.PlanBuildError("single_blocks.3", ["node 'n': no"]),
        "TensorRT cannot build block 'single_blocks.3': node 'n': no. If the ONNX files are older "
        'than this version of the pack, run "Export FLUX FP4 to ONNX" again.',
    ),
    (
        errors.EngineLintError("single_blocks.3", {"linear1": "runs as a BFloat16 GEMM"}),
        "Block 'single_blocks.3' lost its precision in the build (linear1: runs as a BFloat16 "
        "GEMM). The plan was not stored. Quantize and export the block again, or report the "
        "TensorRT version.",
    ),
    (
        errors.WorkerDiedError(
            "single_blocks.3",
            "signal 9 SIGKILL, most likely killed for want of memory: 0.2 of 23.5 GiB were free",
            "signal 11 SIGSEGV",
            ["building", "x"],
        ),
        "Block 'single_blocks.3' cannot be built: the build process was lost (signal 9 SIGKILL, "
        "most likely killed for want of memory: 0.2 of 23.5 GiB were free), and again when it ran "
        "alone (signal 11 SIGSEGV). Last output: building | x. Close other programs or lower "
        "'workers', then run \"Build TensorRT Engine\" again; finished blocks are kept.",
    ),
    (
        errors.ManifestMissingError(ENGINE, 3, False),
        "Engine 'flux/sm120' cannot be loaded: it has no manifest.json (3 plan files found, none "
        'was opened). Run "Build TensorRT Engine"; finished blocks are kept.',
    ),
    (
        errors.ManifestInvalidError(ENGINE / "manifest.json", "blocks.0.file", "no"),
        "'sm120/manifest.json' is refused: field 'blocks.0.file': no. Was this engine built on "
        'this machine? Build it again with "Build TensorRT Engine".',
    ),
    (
        errors.PlanMissingError("a.plan", "is missing"),
        f"'a.plan' is missing. {REBUILD}",
    ),
    (
        errors.PlanTruncatedError("a.plan", "has 1 bytes, its manifest says 2"),
        f"'a.plan' has 1 bytes, its manifest says 2. {REBUILD}",
    ),
    (
        errors.PlanDigestError("a.plan", "is not the plan"),
        "'a.plan' is not the plan. Was this engine built on this machine? Build it again with "
        '"Build TensorRT Engine".',
    ),
    (
        errors.EngineStaleError("a.plan", "is older"),
        f"'a.plan' is older. {REBUILD}",
    ),
    (
        errors.EngineVersionError("tensorrt_rtx 1.6", "tensorrt_rtx 1.7"),
        "The engine was built with tensorrt_rtx 1.6; installed is tensorrt_rtx 1.7, and plans do "
        f"not move between releases. {REBUILD}",
    ),
    (
        errors.EngineTargetError("NVIDIA GeForce RTX 4090", "sm89", ["sm120", "sm121"]),
        "The engine targets SM120, SM121; this GPU is SM89 (NVIDIA GeForce RTX 4090). Build it "
        'for this GPU with "Build TensorRT Engine".',
    ),
    (
        errors.BlockInputError("single_blocks.3", "input 'x' is [1]"),
        "Block 'single_blocks.3' cannot run: input 'x' is [1].",
    ),
    (
        errors.EngineNotLoadedError("single_blocks.3"),
        "Block 'single_blocks.3' cannot run: the engine is not loaded. Load it first.",
    ),
    (
        errors.ExecutionError("single_blocks.3", "execute_async_v3", ["bad launch"]),
        "TensorRT failed at block 'single_blocks.3' in execute_async_v3: bad launch. If it "
        'happens again, build the engine again with "Build TensorRT Engine".',
    ),
]


@pytest.mark.parametrize(("error", "text"), EXAMPLES, ids=[type(e).__name__ for e, _ in EXAMPLES])
def test_text_and_fields(error: EngineError, text: str) -> None:
    assert str(error) == text
    assert str(type(error)(**vars(error))) == text


def test_every_class_has_an_example() -> None:
    classes = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, EngineError)
    }
    abstract = {
        EngineError,
        errors.EngineMismatchError,
        errors.BuildSpecError,
        errors.StorageError,
    }
    assert classes - abstract == {type(error) for error, _ in EXAMPLES}
