"""Errors that the nodes raise themselves; the layers below bring their own."""

from __future__ import annotations

from collections.abc import Sequence


class NodeError(Exception):
    """Root of every error the node layer raises on purpose."""


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
            f"{name!r} cannot be the name of an FP4 checkpoint: {reason}. "
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
            "hold different weights. Run 'Export FLUX FP4 to ONNX' and 'Build TensorRT Engine' "
            "again."
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
        super().__init__(f"A FLUX FP4 engine {feature}. {next_step}")


class PreflightError(NodeError):
    """Something that would stop the work later, found before it begins.

    Attributes:
        what: What was to be made.
        problems: What, limit and next step of each.
    """

    def __init__(self, what: str, problems: Sequence[str]) -> None:
        self.what, self.problems = what, tuple(problems)
        listed = "\n".join(f"- {problem}" for problem in self.problems)
        super().__init__(f"'{what}' cannot be made on this machine. Nothing was begun.\n{listed}")


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
