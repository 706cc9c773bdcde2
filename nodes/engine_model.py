"""The MODEL: ComfyUI's own Flux with engine-backed blocks.

`Flux.forward_orig` stays ComfyUI's, so ControlNet residuals, block replacements, reference latents
and wrappers work as on any FLUX. Embedders, modulation and the final layer are PyTorch modules in
the dtype that ComfyUI chooses; the engine owns everything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import comfy.model_detection
import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from torch import Tensor, nn

from .attention_masks import AttentionMasks
from .engine_blocks import BlockEngine, EngineDoubleBlock, EngineSingleBlock
from .errors import CheckpointWeightsError
from .modulation_table import install_table
from .rotary import RotaryTables
from .weight_changes import StoredLinears

if TYPE_CHECKING:
    from comfy.model_base import BaseModel

    from ..trt_runtime.selection import Selection

STREAM_COPIES = 6
"""Token tensors of hidden size alive at once outside of the engine: inputs and outputs of a block,
their concatenation, and the copies that a ControlNet or a block replacement keeps."""


class ModelEngine(BlockEngine, Protocol):
    """What the MODEL needs of an engine."""

    @property
    def weight_bytes(self) -> int: ...
    @property
    def resident_bytes(self) -> int: ...
    def bytes_within(self, limit: int | None) -> int: ...
    def limit(self, weight_bytes: int | None) -> None: ...
    @property
    def loaded(self) -> bool: ...
    def activation_bytes(self, batch: int, img_tokens: int, txt_tokens: int) -> int: ...
    @property
    def folder(self) -> Path: ...
    @property
    def selection(self) -> Selection: ...
    def use(self, selection: Selection) -> None: ...
    def load(self, device: torch.device) -> None: ...
    def unload(self) -> None: ...


class StoredModel(StoredLinears, Protocol):
    """What the MODEL needs of the quantized checkpoint."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class EngineOptions:
    """What the loader node lets users choose besides the backend.

    Attributes:
        precompute_modulation: Keep the blocks' modulation weights in main memory and compute the
            vectors of all steps at once. FLUX.2's blocks have no such weights.
        engine_limit: GPU memory for the engine's weights in bytes; None: what ComfyUI has to give.
        bakes_lora: Merge LoRAs into blocks, instead of running them beside.
        cuda_graphs: Let TensorRT-RTX launch each block as one CUDA graph.
    """

    precompute_modulation: bool = True
    engine_limit: int | None = None
    bakes_lora: bool = False
    cuda_graphs: bool = False


class SamplingMemory:
    """Answers ``BaseModel.memory_required``: what sampling needs besides the weights.

    ComfyUI's own estimate is for torch attention over the whole transformer. An engine allocates
    the activations of one block, in a size it knows, and torch holds the token streams.
    """

    def __init__(
        self,
        engine: ModelEngine,
        unet_config: Mapping[str, Any],
        txt_tokens: int,
        modulation_bytes: int,
    ):
        self.engine, self.modulation_bytes = engine, modulation_bytes
        self.hidden_size = unet_config["hidden_size"]
        self.patch_size = unet_config["patch_size"]
        self.txt_tokens = txt_tokens

    def __call__(
        self, input_shape: list[int], cond_shapes: Mapping[str, list[Any]] | None = None
    ) -> int:
        """Return bytes for a latent ``[B, C, h, w]`` and the conditioning shapes ComfyUI knows."""
        shapes = cond_shapes or {}
        batch = input_shape[0]
        img_tokens = math.prod(math.ceil(side / self.patch_size) for side in input_shape[2:])
        references = [math.prod(shape[2:]) for shape in shapes.get("ref_latents", ())]
        img_tokens += math.ceil(max(references, default=0) / self.patch_size**2)
        contexts = [shape[1] for shape in shapes.get("c_crossattn", ())]
        txt_tokens = max(contexts, default=self.txt_tokens)
        tokens = batch * (img_tokens + txt_tokens)
        # fp32 bounds every dtype that ComfyUI may compute in
        streams = STREAM_COPIES * tokens * self.hidden_size * torch.float32.itemsize
        activations = self.engine.activation_bytes(batch, img_tokens, txt_tokens)
        return streams + activations + self.modulation_bytes


def build_engine_model(
    unet_config: Mapping[str, Any],
    weights: dict[str, Tensor],
    engine: ModelEngine,
    plan_linears: Mapping[str, Sequence[str]],
    checkpoint: StoredModel,
    max_txt_tokens: int,
    load_device: torch.device,
    options: EngineOptions,
) -> BaseModel:
    """Return ComfyUI's model object for a FLUX whose blocks are in `engine`.

    Args:
        unet_config: The transformer's configuration in ComfyUI's names.
        weights: Every weight outside of the block plans, in BFL's or ComfyUI's names.
        engine: Runs the blocks.
        plan_linears: Names of the Linears in each block's plan.
        checkpoint: The quantized checkpoint, for error messages and weight patches.
        max_txt_tokens: Longest text the engine takes.
        load_device: Where the model will sample.
        options: How it shall run.

    Raises:
        CheckpointWeightsError: `weights` are not exactly those that the model needs.
    """
    # The plans hold the blocks: with depth 0 ComfyUI allocates none of their weights.
    config = comfy.model_detection.model_config_from_unet_config(
        {**unet_config, "depth": 0, "depth_single_blocks": 0}
    )
    _choose_dtype(config, weights, load_device)
    model = config.get_model({})
    flux = model.diffusion_model
    rotary, masks = RotaryTables(), AttentionMasks(engine)
    flux.double_blocks = nn.ModuleList(
        EngineDoubleBlock(
            f"double_blocks.{index}",
            engine,
            rotary,
            masks,
            _double_block_sizes(unet_config),
            _weight_options(config),
        )
        for index in range(unet_config["depth"])
    )
    flux.single_blocks = nn.ModuleList(
        EngineSingleBlock(
            f"single_blocks.{index}",
            engine,
            rotary,
            masks,
            _single_block_sizes(unet_config),
            _weight_options(config),
        )
        for index in range(unet_config["depth_single_blocks"])
    )
    for name in ("depth", "depth_single_blocks"):
        setattr(flux.params, name, unet_config[name])
        config.unet_config[name] = unet_config[name]
    _load_weights(model, weights, checkpoint.name)
    flux.requires_grad_(False).eval()
    comfy.model_management.archive_model_dtypes(flux)
    model.engine, model.checkpoint, model.plan_linears = engine, checkpoint, plan_linears
    model.bakes_lora = options.bakes_lora
    model.attention_masks = masks
    model.engine_limit = options.engine_limit
    model.modulation = install_table(model) if options.precompute_modulation else None
    working_bytes = 0 if model.modulation is None else model.modulation.working_bytes
    model.memory_required = SamplingMemory(engine, unet_config, max_txt_tokens, working_bytes)
    return model


def _choose_dtype(config: Any, weights: Mapping[str, Tensor], load_device: torch.device) -> None:
    # The same steps as comfy.sd.load_diffusion_model_state_dict (0.30), so that command line
    # options such as --bf16-unet and machines without bf16 get what stock FLUX gets.
    supported = list(config.supported_inference_dtypes)
    config.quant_config = comfy.utils.detect_layer_quantization(weights, "")
    quantized = config.quant_config is not None
    dtype = comfy.model_management.unet_dtype(
        device=load_device,
        model_params=sum(weight.numel() for weight in weights.values()),
        supported_dtypes=supported,
        weight_dtype=None if quantized else _weight_dtype(weights),
    )
    manual_cast = comfy.model_management.unet_manual_cast(
        None if quantized else dtype, load_device, supported
    )
    config.set_inference_dtype(dtype, manual_cast, device=load_device)
    config.custom_operations = comfy.ops.pick_operations(
        dtype, config.manual_cast_dtype, load_device, model_config=config
    )


def _weight_dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    return max(weights.values(), key=Tensor.numel).dtype


def _double_block_sizes(unet_config: Mapping[str, Any]) -> dict[str, Any]:
    return _block_sizes(unet_config) | {
        "qkv_bias": unet_config["qkv_bias"],
        "proj_bias": unet_config.get("ops_bias", True),
    }


def _single_block_sizes(unet_config: Mapping[str, Any]) -> dict[str, Any]:
    return _block_sizes(unet_config) | {"bias": unet_config.get("ops_bias", True)}


def _block_sizes(unet_config: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {name: unet_config[name] for name in ("hidden_size", "num_heads", "mlp_ratio")}
    # ComfyUI names these in the configuration of FLUX.2 only; the defaults of its FluxParams
    # are FLUX.1's
    return sizes | {
        "modulation": not unet_config.get("global_modulation", False),
        "mlp_silu_act": unet_config.get("mlp_silu_act", False),
    }


def _weight_options(config: Any) -> dict[str, Any]:
    return {
        "dtype": config.unet_config["dtype"],
        "device": None,
        "operations": config.custom_operations,
    }


def _load_weights(model: BaseModel, weights: dict[str, Tensor], checkpoint: str) -> None:
    # With DynamicVRAM on, ComfyUI's Linear takes over the dtype it is given (0.30, ``comfy.ops``).
    dtype = model.get_dtype()
    # Linears with this marker are quantized, and ComfyUI's own Linear reads them as they are.
    quantized = tuple(
        name.removesuffix("comfy_quant") for name in weights if name.endswith(".comfy_quant")
    )
    named = model.model_config.process_unet_state_dict(weights)
    missing, unexpected = model.diffusion_model.load_state_dict(
        {
            name: weight
            if name.startswith(quantized) and not name.endswith(".bias")
            else weight.to(dtype)
            for name, weight in named.items()
        },
        strict=False,
    )
    if missing or unexpected:
        raise CheckpointWeightsError(checkpoint, missing, unexpected)
