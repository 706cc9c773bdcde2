"""Writes the tensors of a FLUX model as every checkpoint layout that is in circulation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from flux_fp4.quant.native_nvfp4 import to_native
from flux_fp4.quant.nvfp4 import NVFP4Weight, quantize_weight
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
Weights = Mapping[str, Tensor]

FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def swap_halves(tensor: Tensor) -> Tensor:
    """Exchange scale and shift of the last modulation."""
    upper, lower = tensor.chunk(2)
    return torch.cat((lower, upper))


def diffusers_state(state: Weights) -> State:
    """Rename and split BFL's tensors as diffusers' conversion of FLUX.1 or FLUX.2 does."""
    flux2 = "single_stream_modulation.lin.weight" in state
    converted: State = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        kind = "weight" if kind == "scale" else kind
        stack, _, inner = layer.partition(".")
        index, _, inner = inner.partition(".")
        if stack == "double_blocks":
            renamed = _double_layers(inner, flux2)
            start = f"transformer_blocks.{index}."
        elif stack == "single_blocks":
            renamed = _single_layers(inner, flux2)
            start = f"single_transformer_blocks.{index}."
        else:
            renamed, start = (_outer_layer(layer, flux2),), ""
        if layer == "final_layer.adaLN_modulation.1":
            tensor = swap_halves(tensor)
        # q, k, v of a single block stand above an MLP of four times their height
        quarter = tensor.shape[0] // 7
        heights = (quarter, quarter, quarter, 4 * quarter)
        split = tensor.split(heights) if len(renamed) == 4 else tensor.chunk(len(renamed))
        for part, rows in zip(renamed, split, strict=True):
            converted[f"{start}{part}.{kind}"] = rows.clone()
    return converted


def _outer_layer(layer: str, flux2: bool) -> str:
    time = "time_guidance_embed" if flux2 else "time_text_embed"
    embedder = {"time_in": "timestep", "guidance_in": "guidance", "vector_in": "text"}
    first, _, inner = layer.partition(".")
    if first in embedder:
        number = {"in_layer": 1, "out_layer": 2}[inner]
        return f"{time}.{embedder[first]}_embedder.linear_{number}"
    renamed = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    }
    return renamed[layer] if layer in renamed else layer.replace(".lin", ".linear")


def _double_layers(inner: str, flux2: bool) -> tuple[str, ...]:
    stream, _, inner = inner.partition("_")
    image = stream == "img"
    if inner == "attn.qkv":
        names = ("to_q", "to_k", "to_v") if image else ("add_q_proj", "add_k_proj", "add_v_proj")
        return tuple(f"attn.{name}" for name in names)
    feed = "ff" if image else "ff_context"
    return (
        {
            "attn.proj": "attn.to_out.0" if image else "attn.to_add_out",
            "attn.norm.query_norm": "attn.norm_q" if image else "attn.norm_added_q",
            "attn.norm.key_norm": "attn.norm_k" if image else "attn.norm_added_k",
            "mod.lin": "norm1.linear" if image else "norm1_context.linear",
            "mlp.0": f"{feed}.linear_in" if flux2 else f"{feed}.net.0.proj",
            "mlp.2": f"{feed}.linear_out" if flux2 else f"{feed}.net.2",
        }[inner],
    )


def _single_layers(inner: str, flux2: bool) -> tuple[str, ...]:
    if inner == "linear1" and not flux2:
        return ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    return (
        {
            "linear1": "attn.to_qkv_mlp_proj",
            "linear2": "attn.to_out" if flux2 else "proj_out",
            "modulation.lin": "norm.linear",
            "norm.query_norm": "attn.norm_q",
            "norm.key_norm": "attn.norm_k",
        }[inner],
    )


def save_sharded(state: Weights, folder: Path, shards: int = 3) -> Path:
    """Write as ``save_pretrained`` does, tensors dealt out in turn; return the index."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = "diffusion_pytorch_model"
    dealt: list[State] = [{} for _ in range(shards)]
    weight_map = {}
    for number, (name, tensor) in enumerate(state.items()):
        shard = number % shards
        dealt[shard][name] = tensor
        weight_map[name] = f"{stem}-{shard + 1:05}-of-{shards:05}.safetensors"
    for shard, tensors in enumerate(dealt, start=1):
        file = folder / f"{stem}-{shard:05}-of-{shards:05}.safetensors"
        save_file(tensors, file, metadata={"format": "pt"})
    index = folder / f"{stem}.safetensors.index.json"
    total = sum(tensor.nbytes for tensor in state.values())
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return index


def is_linear(name: str, tensor: Tensor) -> bool:
    """Whether converters to FP8 and FP4 take it: the matrices of the blocks."""
    return tensor.ndim == 2 and "_blocks." in name


def fp8_state(state: Weights, dtype: torch.dtype = torch.float8_e4m3fn) -> State:
    """Cast every tensor to plain FP8, as ``--fp8_e4m3fn-unet`` saves it."""
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def scaled_fp8_state(
    state: Weights,
    scale_name: str,
    dtype: torch.dtype = torch.float8_e4m3fn,
    mark: Callable[[str, State], None] | None = None,
) -> State:
    """Quantize the blocks' matrices to FP8 with one scale each, named ``<layer>.<scale_name>``."""
    converted: State = {}
    for name, tensor in state.items():
        if not is_linear(name, tensor):
            converted[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        scale = tensor.float().abs().amax() / FP8_MAX[dtype]
        converted[name] = (tensor.float() / scale).to(dtype)
        converted[f"{layer}.{scale_name}"] = scale
        if mark is not None:
            mark(layer, converted)
    return converted


def comfy_mark(quant_format: str) -> Callable[[str, State], None]:
    """Mark layers with a ``comfy_quant`` tensor."""

    def mark(layer: str, state: State) -> None:
        text = json.dumps({"format": quant_format}).encode()
        state[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)

    return mark


def header_mark(state: Weights, quant_format: str, prefix: str = "") -> dict[str, str]:
    """Return the metadata by which BFL's published files mark quantized layers."""
    suffix = ".weight_scale"
    layers = {
        prefix + name.removesuffix(suffix): {"format": quant_format}
        for name in state
        if name.endswith(suffix)
    }
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def nvfp4_weights(state: Weights) -> dict[str, NVFP4Weight]:
    """Quantize the blocks' matrices by their own maxima."""
    return {
        name: quantize_weight(tensor, name)
        for name, tensor in state.items()
        if is_linear(name, tensor)
    }


def nvfp4_state(state: Weights, weights: Mapping[str, NVFP4Weight], *, native: bool) -> State:
    """Store NVFP4 weights in ComfyUI's layout or in ModelOpt's."""
    converted = {name: tensor for name, tensor in state.items() if name not in weights}
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        stored = to_native(weight) if native else weight
        converted[name] = stored.packed
        converted[f"{layer}.weight_scale"] = stored.block_scale
        converted[f"{layer}.weight_scale_2"] = stored.global_scale.clone()
        converted[f"{layer}.input_scale"] = torch.tensor(0.01)
    return converted


def save_state(state: Weights, folder: Path, metadata: dict[str, str] | None = None) -> Path:
    """Write one file."""
    path = folder / "tiny.safetensors"
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(contiguous, path, metadata)
    return path


def with_prefix(state: Weights, prefix: str) -> State:
    """Put a prefix before every name."""
    return {prefix + name: tensor for name, tensor in state.items()}


def all_in_one_state(state: Weights) -> State:
    """Put a VAE and text encoders beside the transformer, under ComfyUI's prefixes."""
    return {
        **with_prefix(state, "model.diffusion_model."),
        "vae.decoder.conv_in.weight": torch.zeros(4, 4, 3, 3),
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight": torch.ones(8),
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": (
            torch.zeros(4, 4).to(torch.float8_e4m3fn)
        ),
        "text_encoders.t5xxl.transformer.scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn),
    }
