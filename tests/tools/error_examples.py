"""One example of every error that the pack raises on purpose, with values as users meet them.

`nodes/errors.py` imports nothing of ComfyUI, so it is loaded by its path: the examples need none.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from flux_fp4.cli import errors as cli
from flux_fp4.quant.errors import (
    calibration,
    export,
    files,
    quality,
    recipes,
    sources,
    speed,
    training,
)
from flux_fp4.quant.errors.calibration import OTHER_SAMPLES
from flux_fp4.trt_runtime.errors import BUILD_NODE, backend, blocks, build, engine, run, storage
from pack_import import ROOT

ONNX = Path("flux1-dev-nvfp4/single_blocks.3.onnx")
ENGINE = Path("flux1-dev-nvfp4/sm120")
PLAN = "single_blocks.3-0f3a5c7e9b1d.plan"
CHECKPOINT = "flux1-dev-nvfp4"
SOURCE = "flux1-dev.safetensors"


def _node_errors() -> ModuleType:
    file = ROOT / "nodes" / "errors.py"
    spec = importlib.util.spec_from_file_location("flux_fp4.nodes.errors", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nodes = _node_errors()

QUANT: tuple[Exception, ...] = (
    sources.UnknownCheckpointError(SOURCE, "it is incomplete", ["img_in.bias", "img_in.weight"]),
    sources.DamagedCheckpointError(SOURCE, "its scale 'img_in.weight_scale' is missing"),
    sources.UnsupportedWeightError(
        "double_blocks.0.img_mlp.0",
        "its weight has 3080 inputs",
        "a multiple of 16 is needed",
    ),
    sources.NoiseCheckpointError("flux1-dev-nvfp4.safetensors", "modelopt-nvfp4", -1.25),
    calibration.CalibrationError(
        "latents have 4 channels", "'flux1-dev' takes 16; encode the pictures with its own VAE"
    ),
    calibration.CalibrationFileError("samples.safetensors", "it lacks 'version'"),
    calibration.NotFiniteError("The output of 'double_blocks.7'", OTHER_SAMPLES),
    calibration.StatisticsMissingError(CHECKPOINT, "double_blocks.7"),
    recipes.RecipeError("mine.yaml", "its name is 'other', not 'mine'"),
    recipes.FormatBudgetError("the smallest weights take 6.012 GiB", "5.000 GiB are allowed"),
    speed.UnknownGpuError(
        "NVIDIA GeForce RTX 3090", ["GeForce RTX 5090", "GeForce RTX 5080", "GeForce RTX 4090"]
    ),
    speed.FormatNotInGpuError("GeForce RTX 4090", "nvfp4", ["FP8", "BF16"]),
    files.QuantizedCheckpointError(CHECKPOINT, "its header has no 'flux_fp4' entry"),
    files.CheckpointBusyError(f"{CHECKPOINT}.safetensors"),
    files.DiskFullError(f"{CHECKPOINT}.safetensors", 12_300_000_000, 850_000_000),
    files.FileWriteError(f"{CHECKPOINT}.safetensors", CHECKPOINT, "Input/output error"),
    files.FolderNotWritableError(CHECKPOINT, "Read-only file system"),
    quality.MetricLibraryError(
        "FID", "No module named 'torch_fidelity'", "python -m pip install torch-fidelity"
    ),
    quality.MetricWeightsError(
        "LPIPS", "alexnet-owt-7be5be79.pth", "download.pytorch.org", "the host is not known"
    ),
    quality.TooFewPicturesError(
        "FID", 64, 2049, "its covariance of 2,048 features has no inverse with fewer"
    ),
    quality.PicturesError(
        "The first set has 4 pictures, the second 5",
        "both need the same number",
        "Connect pictures of the same prompts and seeds.",
    ),
    quality.PromptsError("There are 3 prompts for 4 pictures", "each picture needs its own"),
    quality.ImageRewardFailedError(1, "CUDA out of memory"),
    training.TrainingPackageError("accelerate>=1.6", "Distillation"),
    training.LaunchError(
        "a batch of 3 on 2 processes",
        "each process takes as many samples",
        "Choose a --batch that 2 divides.",
    ),
    training.ForeignRunError("flux1-dev-qad", "learning rate", 0.003, 0.001),
    training.LossNotFiniteError(17, float("inf")),
    training.ProcessLostError(1, "Connection closed by peer [127.0.0.1]:29500"),
    training.NoGainError("flux1-dev-qad", 15.21, 15.02),
    training.ForeignSourceError(CHECKPOINT, SOURCE, "flux1-schnell.safetensors"),
    export.OnnxExportMissingError(CHECKPOINT, "'single_blocks.3.onnx' is missing"),
    export.TransformerExportError(CHECKPOINT, "double_blocks.0.img_mod.lin"),
    export.NativeCheckpointError(
        CHECKPOINT,
        "double_blocks.0.img_mlp.0",
        "has a low-rank branch (SVDQuant), which ComfyUI does not compute",
    ),
    export.NativeTargetError(f"{CHECKPOINT}.safetensors"),
)

TRT_RUNTIME: tuple[Exception, ...] = (
    backend.BackendMissingError("tensorrt", "tensorrt>=11", "No module named 'tensorrt'"),
    backend.BackendUnusableError("tensorrt_rtx", "torch finds no CUDA GPU"),
    backend.EngineVersionError("tensorrt_rtx 1.6.0.55", "tensorrt_rtx 1.7.1.28"),
    backend.EngineTargetError("NVIDIA GeForce RTX 4090", "sm89", ["sm120", "sm121"]),
    blocks.BlockContractError(ONNX, "it has sparse weights"),
    blocks.BlocksMissingError(ENGINE.parent, ["double_blocks.1", "single_blocks.0"]),
    blocks.BlocksMixedError(ENGINE.parent, "2 different values of 'depth'"),
    storage.DiskFullError(ENGINE / PLAN, 127_000_000, 20_000_000),
    storage.FileWriteError(ENGINE / PLAN, "Read-only file system"),
    storage.EngineBusyError(ENGINE),
    storage.EngineInUseError(ENGINE),
    build.BuildSpecError(
        "Target 'sm75' cannot run bf16, which every recipe uses",
        "sm80 or newer can",
        f"Choose another 'target' in {BUILD_NODE}.",
    ),
    build.FormatTargetError(
        "sm89", "the NVFP4 weights of 'single_blocks.3'", "one of sm120, sm121", "recipe 'fp8'"
    ),
    build.PlanBuildError("single_blocks.3", ["node 'linear1': unsupported type"]),
    build.EngineLintError("single_blocks.3", {"linear1": "runs as a BFloat16 GEMM"}),
    build.WorkerDiedError(
        "single_blocks.3",
        "signal 9 SIGKILL, most likely killed for want of memory: 0.2 of 23.5 GiB were free",
        "signal 11 SIGSEGV",
        ["building single_blocks.3"],
    ),
    engine.ManifestMissingError(ENGINE, 3, False),
    engine.ManifestInvalidError(ENGINE / "manifest.json", "blocks.0.file", "Field required"),
    engine.PlanMissingError(PLAN, "is missing"),
    engine.PlanTruncatedError(PLAN, "has 1000 bytes, its manifest says 64000000"),
    engine.PlanDigestError(PLAN, "is not the plan that its manifest describes (wrong digest)"),
    engine.EngineStaleError(PLAN, f"is older than '{ONNX.name}', which was exported again"),
    engine.VariantPlanMissingError(["double_blocks.0.lora", "single_blocks.3.lora"]),
    run.ShapeProfileError("image", 6144, 16, 4096, "max megapixels"),
    run.BlockInputError("single_blocks.3", "input 'x' is [1, 64], expected [1, 4608, 3072]"),
    run.AdapterError("single_blocks.3", "linear1", "rank 600 is not within 1 to 512"),
    run.EngineNotLoadedError("single_blocks.3"),
    run.SelfTestError("single_blocks.0", 3.25, 10.0, ENGINE / "self_test_failed.json"),
    run.PlanValidityError("single_blocks.0", ["OLD_CUDA_DRIVER"]),
    run.ExecutionError("single_blocks.3", "create_execution_context", ["invalid handle"]),
)

NODES: tuple[Exception, ...] = (
    nodes.ArtifactNameError("../x", "it has a character that is not allowed in file names"),
    nodes.ArtifactNotFoundError(
        "engine",
        f"{CHECKPOINT}/sm120",
        "Make it with 'Build TensorRT Engine' or choose another one.",
    ),
    nodes.SourceCheckpointError("flux1-dev.gguf"),
    nodes.CalibrationInputError(
        "This latent is empty",
        "calibration needs real pictures, because noise alone has other value ranges",
        "Connect 'Load Image' and 'VAE Encode' instead of an empty latent.",
    ),
    nodes.CalibrationMissingError(SOURCE, "flux1-dev-nvfp4-max"),
    nodes.ModelSourceError(
        "it is a SDXL model, not FLUX", "Connect 'Load Diffusion Model' with a FLUX checkpoint."
    ),
    nodes.NothingShownError("collect garbage", "list"),
    nodes.RebuildError(
        ["flux1-dev-nvfp4/sm120"], {"flux1-dev-fp8/sm89": "its checkpoint cannot be read"}
    ),
    nodes.EngineOutdatedError(f"{CHECKPOINT}/sm120", CHECKPOINT),
    nodes.CheckpointWeightsError(CHECKPOINT, ["img_in.weight"], ["img_in.extra"]),
    nodes.EngineWeightError(
        ["double_blocks.0.img_attn.qkv.bias", "double_blocks.1.img_attn.qkv.bias"],
        "This LoRA or weight patch changes",
    ),
    nodes.WeightChangeError(
        "double_blocks.0.img_mlp.0",
        "its adapters have rank 600 together, and an engine takes 512",
    ),
    nodes.BakeError(
        CHECKPOINT,
        f"the checkpoint '{SOURCE}' that it was quantized from is gone",
        "Put that file back into models/diffusion_models",
    ),
    nodes.EngineModelError(
        "cannot be merged with another model",
        "Merge the FLUX checkpoints and quantize the result with 'Quantize FLUX to FP4'",
    ),
    nodes.PreflightError(
        CHECKPOINT,
        [
            "The disk of 'models/flux_fp4' has 9.0 GB left, and 17.0 GB are needed. Free some "
            "space, or add a 'flux_fp4' folder on another disk to extra_model_paths.yaml.",
            "1.0 GB of main memory are free, and 4.0 GB are needed. Close other programs, or press "
            "'Free model and node cache' in ComfyUI.",
        ],
    ),
    nodes.UnsupportedByEngineError(
        "A replaced attention function",
        "double_blocks.0",
        "Remove the node that overrides attention",
    ),
    nodes.PackageMissingError("modelopt", "No module named 'modelopt'"),
    nodes.SamplerNotComparableError("dpm_adaptive", 31, 28),
    nodes.FileAccessError("models/flux_fp4/flux1-dev-nvfp4", "Permission denied"),
    nodes.NoGpuError("cpu"),
)

CLI: tuple[Exception, ...] = (
    cli.ModelsFolderError("'/data/flux' is no folder"),
    cli.NameRefusedError("../x", "it has a character that is not allowed in file names"),
    cli.NotFoundError(
        "engine", f"{CHECKPOINT}/sm120", [Path("models")], "The command `build` makes one."
    ),
    cli.OutdatedEngineError(f"{CHECKPOINT}/sm120"),
    cli.StoppedError(1),
    cli.OptionError("--days", "-1 is not between 0 and 100000"),
)

LAYERS = {"nodes": NODES, "quant": QUANT, "trt_runtime": TRT_RUNTIME, "cli": CLI}

CORE_NODES = {
    "InpaintModelConditioning",
    "InstructPixToPixConditioning",
    "CLIP Text Encode (Prompt)",
    "Edit Model Reference Method",
    "Load CLIP (Dual)",
    "Load CLIP",
    "Load Checkpoint",
    "Load ControlNet Model",
    "Load Diffusion Model",
    "Load Image",
    "Load LoRA",
    "Load Style Model",
    "Load VAE",
    "VAE Decode",
    "VAE Encode",
}
"""ComfyUI's own nodes that texts of the pack name; a test compares them with a running server."""
