"""Errors that the nodes raise themselves; the layers below bring their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..trt_runtime.errors import REBUILD


class NodeError(Exception):
    """Root of every error the node layer raises on purpose."""

    def __init_subclass__(cls) -> None:
        # Inside ComfyUI the pack's modules are named by their path on the disk, and the errors
        # panel, 38 letters wide, shows the full class name twice above the text.
        super().__init_subclass__()
        cls.__module__ = "flux_fp4"


class ArtifactNameError(NodeError):
    """A name cannot become a file or folder in a model folder.

    Attributes:
        name: The rejected name.
        reason: Which rule it breaks.
        node: Display name of the node to enter another name in.
    """

    def __init__(self, name: str, reason: str, node: str = "Quantize FLUX to FP4") -> None:
        self.name, self.reason, self.node = name, reason, node
        super().__init__(
            f"{name!r} cannot be the name of a file: {reason}. "
            f"Enter a plain name such as 'flux1-dev-nvfp4' in '{node}'."
        )


class ArtifactNotFoundError(NodeError):
    """Nothing of that name lies in the model folders.

    Attributes:
        kind: What was looked for, in the user's words.
        name: The name that was looked for.
        next_step: The node that makes it.
    """

    def __init__(self, kind: str, name: str, next_step: str) -> None:
        self.kind, self.name, self.next_step = kind, name, next_step
        super().__init__(f"There is no {kind} {name!r} in the model folder 'flux_fp4'. {next_step}")


class SourceCheckpointError(NodeError):
    """The FLUX checkpoint to quantize is not a safetensors file of ComfyUI's model folder.

    Attributes:
        name: The name that was chosen.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"{name!r} is not a .safetensors file in ComfyUI's model folder 'diffusion_models'. "
            "Put the FLUX checkpoint there, press R to refresh the lists and choose it again."
        )


class CalibrationInputError(NodeError):
    """CONDITIONING or LATENT cannot be turned into calibration samples.

    Attributes:
        found: What was connected.
        limit: What is needed.
        next_step: What to connect instead.
    """

    def __init__(self, found: str, limit: str, next_step: str) -> None:
        self.found, self.limit, self.next_step = found, limit, next_step
        super().__init__(f"{found}; {limit}. {next_step}")


class CalibrationMissingError(NodeError):
    """A checkpoint has to be quantized, but no calibration samples are connected.

    Attributes:
        checkpoint: The FLUX checkpoint.
        name: Name of the quantized checkpoint that is missing or outdated.
    """

    def __init__(self, checkpoint: str, name: str) -> None:
        self.checkpoint, self.name = checkpoint, name
        super().__init__(
            f"{name!r} has to be quantized from {checkpoint!r} first, which needs calibration "
            "samples. Connect 'FLUX Calibration Samples' to 'samples'."
        )


class ModelSourceError(NodeError):
    """A MODEL cannot be quantized.

    Attributes:
        reason: What is in the way.
        next_step: What to connect instead.
    """

    def __init__(self, reason: str, next_step: str) -> None:
        self.reason, self.next_step = reason, next_step
        super().__init__(f"This MODEL cannot be quantized: {reason}. {next_step}")


class NothingShownError(NodeError):
    """Something was to be deleted that the user has not seen.

    Attributes:
        action: What was asked for.
        before: The action that shows what it would do.
    """

    def __init__(self, action: str, before: str) -> None:
        self.action, self.before = action, before
        super().__init__(
            f"'{action}' deletes only what this node has shown, once, and nothing is shown since "
            f"ComfyUI started or since the last time. Choose action '{before}', queue, read what "
            f"would go, then choose '{action}'."
        )


class RebuildError(NodeError):
    """Stale engines that could not be built again.

    Attributes:
        built: Names of those that were.
        faults: Why not, by the name of the engine.
    """

    def __init__(self, built: Sequence[str], faults: Mapping[str, str]) -> None:
        self.built, self.faults = tuple(built), dict(faults)
        listed = "\n".join(f"- {name}: {fault}" for name, fault in self.faults.items())
        done = f" Built: {', '.join(self.built)}." if self.built else ""
        super().__init__(
            f"{len(self.faults)} engines could not be built again:\n{listed}\n"
            f"Remove what stands in the way, and queue again.{done}"
        )


class EngineOutdatedError(NodeError):
    """The engine was built from other weights than those of its quantized checkpoint.

    Attributes:
        engine: Name of the engine.
        checkpoint: Name of the quantized checkpoint beside it.
    """

    def __init__(self, engine: str, checkpoint: str) -> None:
        self.engine, self.checkpoint = engine, checkpoint
        super().__init__(
            f"Engine {engine!r} was built before {checkpoint!r} was quantized again, so the two "
            f"hold different weights. {REBUILD}"
        )


class CheckpointWeightsError(NodeError):
    """The quantized checkpoint lacks weights that stay in PyTorch, or has unknown ones.

    Attributes:
        checkpoint: Name of the quantized checkpoint.
        missing: Names of weights that the model needs and the file lacks.
        unexpected: Names of weights in the file that the model does not know.
    """

    def __init__(self, checkpoint: str, missing: Sequence[str], unexpected: Sequence[str]) -> None:
        self.checkpoint, self.missing, self.unexpected = checkpoint, missing, unexpected
        super().__init__(
            f"The weights of {checkpoint!r} outside the engine do not fit its FLUX configuration: "
            f"{len(missing)} missing (first: {next(iter(missing), None)!r}), {len(unexpected)} "
            f"unknown (first: {next(iter(unexpected), None)!r}). Make the checkpoint again with "
            "'Quantize FLUX to FP4'."
        )


class EngineWeightError(NodeError):
    """Something wants to read or patch a weight that lies inside a TensorRT plan.

    Attributes:
        weights: Names of the weights, for example ``double_blocks.0.img_attn.qkv.weight``.
        reason: What was attempted, as the start of a sentence.
    """

    def __init__(self, weights: Sequence[str], reason: str) -> None:
        self.weights, self.reason = tuple(weights), reason
        more = f" and {len(weights) - 1} more weights" if len(weights) > 1 else ""
        super().__init__(
            f"{reason} {weights[0]!r}{more}, which the engine holds inside its plans. A LoRA of "
            "'Load LoRA' can change the weights of its Linears, but not biases and norms, and not "
            "by schedule or bypass. Merge the change before quantizing: connect the LoRA loader to "
            "'Quantize FLUX MODEL to FP4'. Or use 'Load Diffusion Model' for this MODEL."
        )


class WeightChangeError(NodeError):
    """A LoRA or other patch cannot run beside the quantized weight.

    Attributes:
        linear: Name of the Linear.
        reason: What is in the way.
    """

    def __init__(self, linear: str, reason: str) -> None:
        self.linear, self.reason = linear, reason
        super().__init__(
            f"The change of {linear!r} cannot run on an FP4 engine: {reason}. Merge it before "
            "quantizing: connect its loader to 'Quantize FLUX MODEL to FP4'. Or use 'Load "
            "Diffusion Model' for this MODEL."
        )


class BakeError(NodeError):
    """A LoRA cannot be baked into an engine: the original weights are not there or do not suffice.

    Attributes:
        checkpoint: Name of the engine's quantized checkpoint.
        reason: What is in the way.
        next_step: How to get the weights.
    """

    def __init__(self, checkpoint: str, reason: str, next_step: str) -> None:
        self.checkpoint, self.reason, self.next_step = checkpoint, reason, next_step
        super().__init__(
            f"A LoRA cannot be baked into {checkpoint!r}: {reason}. {next_step}, or choose lora "
            "'runtime' in 'Load FLUX FP4 Engine', which needs no original weights."
        )


class EngineModelError(NodeError):
    """A node needs something of a MODEL that an engine does not have.

    Attributes:
        feature: What was asked for.
        next_step: What to do instead.
    """

    def __init__(self, feature: str, next_step: str) -> None:
        self.feature, self.next_step = feature, next_step
        super().__init__(f"A FLUX FP4 engine {feature}. {next_step}.")


class PreflightError(NodeError):
    """Something that would stop the work later, found before it begins.

    Attributes:
        what: What was to be made.
        problems: What, limit and next step of each.
    """

    def __init__(self, what: str, problems: Sequence[str]) -> None:
        self.what, self.problems = what, tuple(problems)
        listed = "\n".join(f"- {problem}" for problem in self.problems)
        super().__init__(f"'{what}' cannot be made here:\n{listed}")


class UnsupportedByEngineError(NodeError):
    """A sampling option reaches into the attention of a block, which runs inside the engine.

    Attributes:
        feature: The option.
        block: The block that met it.
        next_step: What to remove from the workflow.
    """

    def __init__(self, feature: str, block: str, next_step: str) -> None:
        self.feature, self.block, self.next_step = feature, block, next_step
        super().__init__(
            f"{feature} cannot be applied in '{block}': its attention runs inside the FP4 engine. "
            f"{next_step}, or use 'Load Diffusion Model' for this MODEL."
        )


class PackageMissingError(NodeError):
    """A Python package that the pack needs is not installed, or does not fit the others.

    Attributes:
        package: Its name.
        reason: What Python says.
    """

    def __init__(self, package: str, reason: str) -> None:
        self.package, self.reason = package, reason
        super().__init__(
            f"The Python package '{package}' cannot be used: {reason}. Install what this "
            "pack needs into ComfyUI's Python, in the folder of the pack, with: "
            "python -m pip install -r requirements.txt"
        )


class FileAccessError(NodeError):
    """The system refuses a file that no other error here speaks of.

    Attributes:
        file: Its path; empty if the system names none.
        reason: What the system says.
    """

    def __init__(self, file: str, reason: str) -> None:
        self.file, self.reason = file, reason
        subject = f"'{file}' cannot be used" if file else "A file cannot be used"
        super().__init__(
            f"{subject}: {reason}. Check that it is there, that ComfyUI may read and write it and "
            "that no other program holds it, then queue again."
        )


class SamplerNotComparableError(NodeError):
    """A sampler chooses its own steps, so two models cannot be compared step by step.

    Attributes:
        sampler: Its name.
        reference: How often it evaluated the reference.
        tested: How often it evaluated the tested model.
    """

    def __init__(self, sampler: str, reference: int, tested: int) -> None:
        self.sampler, self.reference, self.tested = sampler, reference, tested
        super().__init__(
            f"The sampler {sampler!r} evaluated the reference {reference} times and the tested "
            f"model {tested} times; models are compared step by step. Choose a sampler that is not "
            "adaptive, such as 'euler'."
        )


class NoGpuError(NodeError):
    """This machine has no GPU whose limits could be shown.

    Attributes:
        device: Where ComfyUI computes.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        super().__init__(
            f"ComfyUI computes on '{device}' here, and limits are those of CUDA GPUs. Choose a GPU "
            "by name in 'GPU'."
        )
