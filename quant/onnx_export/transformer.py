"""The whole transformer as one ONNX file, for other runtimes: the blocks with what surrounds them.

Block graphs are inlined under unique names and not kept as functions: an ONNX function can hold no
initializers, so every weight of a block would have to be an argument of its call.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import onnx_ir as ir

from ..errors.export import TransformerExportError
from ..flux.config import FluxConfig
from ..flux.layers import TIMESTEP_FACTOR, timestep_frequencies
from ..progress import Progress
from ..quantized_checkpoint import QuantizedCheckpoint
from .blocks import block_model, modulate
from .contract import DOUBLE_MODULATION, SINGLE_MODULATION, block_kind
from .export import only_exporter, write_checked
from .graph import BlockGraph

logger = logging.getLogger(__name__)

TRANSFORMER_NAME = "transformer.onnx"

_TO_END = 2**62


def export_transformer(checkpoint: Path, progress: Progress) -> Path:
    """Export the whole transformer of a quantized checkpoint as one ONNX file beside it.

    Inputs, in the high-precision type unless said otherwise: ``img [B, N, patch**2 * C]`` (latent
    patches, channel-major), ``txt [B, T, context_in_dim]``, ``timesteps [B]`` fp32 in ``[0, 1]``,
    ``cos`` and ``sin`` fp32 ``[B, S, head_dim / 2]`` with text tokens first, and where the model
    takes them ``y [B, vec_in_dim]`` and ``guidance [B]`` fp32. Output: ``velocity``, shaped as
    ``img`` but for its channels. Weights stay in the checkpoint.

    Args:
        checkpoint: The quantized checkpoint.
        progress: Called before each block; may raise to cancel.

    Returns:
        The ONNX file. Loading an engine ignores it.

    Raises:
        QuantizedCheckpointError: The file is no quantized checkpoint of this version.
        TransformerExportError: A tensor is stored in a layout that ONNX cannot point into.
    """
    started = time.monotonic()
    header = QuantizedCheckpoint.read(checkpoint)
    blocks = header.metadata.config.block_names
    author = _Author(header)
    author.embed()
    for done, block in enumerate(blocks):
        progress(f"Exporting {block} into {TRANSFORMER_NAME}", done, len(blocks))
        author.block(block)
    velocity = author.velocity()
    path = checkpoint.with_name(TRANSFORMER_NAME)
    with only_exporter(checkpoint, progress):
        write_checked(author.graph.model({"velocity": velocity}, _metadata(header)), path)
    progress("Exported", len(blocks), len(blocks))
    seconds = time.monotonic() - started
    logger.info("Exported %s of %s in %.1f s", TRANSFORMER_NAME, checkpoint.name, seconds)
    return path


def _metadata(checkpoint: QuantizedCheckpoint) -> dict[str, str]:
    metadata = checkpoint.metadata
    return {
        "flux_fp4.variant": metadata.variant,
        "flux_fp4.config": metadata.config.model_dump_json(),
        "flux_fp4.checkpoint_digest": metadata.content_digest,
        "flux_fp4.recipe": metadata.recipe,
    }


class _Author:
    """Emits ``quant/flux/model.py``'s forward pass, the tokens as state between its steps."""

    def __init__(self, checkpoint: QuantizedCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.config: FluxConfig = checkpoint.metadata.config
        self.graph = BlockGraph(checkpoint, None)

    def embed(self) -> None:
        graph, config = self.graph, self.config
        high, fp32 = graph.high_precision, ir.DataType.FLOAT
        img = graph.input("img", ("B", "N", config.in_channels * config.patch_size**2), high)
        txt = graph.input("txt", ("B", "T", config.context_in_dim), high)
        vec = self._embedded("time_in", self._timestep_embedding("timesteps"))
        if config.guidance_embed:
            guidance = self._embedded("guidance_in", self._timestep_embedding("guidance"))
            vec = graph.op("Add", vec, guidance)
        if config.vec_in_dim is not None:
            y = graph.input("y", ("B", config.vec_in_dim), high)
            vec = graph.op("Add", vec, self._embedded("vector_in", y))
        rotary = ("B", "S", config.head_dim // 2)
        self.rotary = {name: graph.input(name, rotary, fp32) for name in ("cos", "sin")}
        # every modulation begins with SiLU of the same vector
        self.vec = self._silu(vec)
        self.img, self.txt = self._linear("img_in", img), self._linear("txt_in", txt)
        self.text_tokens = graph.op("Shape", txt, start=1, end=2)
        self.x: ir.Value | None = None
        self.shared = self._shared_modulation() if config.shared_modulation else {}

    def block(self, block: str) -> None:
        """Inline one block behind the previous one."""
        model = block_model(self.checkpoint, block)
        if block_kind(block) == "double":
            inputs = {"img": self.img, "txt": self.txt, **self._double_modulation(block)}
            outputs = self.graph.inline(model.graph, {**inputs, **self.rotary})
            self.img, self.txt = outputs["img_out"], outputs["txt_out"]
            return
        if self.x is None:
            self.x = self.graph.op("Concat", self.txt, self.img, axis=1)
        inputs = {"x": self.x, **self._single_modulation(block)}
        self.x = self.graph.inline(model.graph, {**inputs, **self.rotary})["x_out"]

    def velocity(self) -> ir.Value:
        """Project the image tokens to latent patches."""
        graph, config = self.graph, self.config
        img = self.img
        if self.x is not None:
            end, axis = graph.integers(_TO_END), graph.integers(1)
            img = graph.op("Slice", self.x, self.text_tokens, end, axis)
        shift, scale = self._vectors("final_layer.adaLN_modulation.1", 2)
        velocity = self._linear("final_layer.linear", modulate(graph, img, shift, scale))
        channels = config.out_channels * config.patch_size**2
        velocity.shape, velocity.dtype = ir.Shape(("B", "N", channels)), graph.high_precision
        return velocity

    def _timestep_embedding(self, name: str) -> ir.Value:
        op = self.graph.op
        t = self.graph.input(name, ("B",), ir.DataType.FLOAT)
        t = op("Mul", t, self.graph.fp32_constant("timestep_factor", TIMESTEP_FACTOR))
        values = timestep_frequencies().numpy()[None]
        frequencies = self.graph.fp32_constant("timestep_frequencies", values)
        angle = op("Mul", op("Unsqueeze", t, self.graph.integers(1)), frequencies)
        embedding = op("Concat", op("Cos", angle), op("Sin", angle), axis=1)
        return op("Cast", embedding, to=int(self.graph.high_precision))

    def _embedded(self, embedder: str, x: ir.Value) -> ir.Value:
        hidden = self._linear(f"{embedder}.in_layer", x)
        return self._linear(f"{embedder}.out_layer", self._silu(hidden))

    def _silu(self, x: ir.Value) -> ir.Value:
        return self.graph.op("Mul", x, self.graph.op("Sigmoid", x))

    def _shared_modulation(self) -> dict[str, tuple[ir.Value, ...]]:
        return {
            "img": self._vectors("double_stream_modulation_img.lin", 6),
            "txt": self._vectors("double_stream_modulation_txt.lin", 6),
            "single": self._vectors("single_stream_modulation.lin", 3),
        }

    def _double_modulation(self, block: str) -> dict[str, ir.Value]:
        vectors: list[ir.Value] = []
        for stream in ("img", "txt"):
            own = self.shared.get(stream) or self._vectors(f"{block}.{stream}_mod.lin", 6)
            vectors += own
        return dict(zip(DOUBLE_MODULATION, vectors, strict=True))

    def _single_modulation(self, block: str) -> dict[str, ir.Value]:
        vectors = self.shared.get("single") or self._vectors(f"{block}.modulation.lin", 3)
        return dict(zip(SINGLE_MODULATION, vectors, strict=True))

    def _vectors(self, linear: str, count: int) -> tuple[ir.Value, ...]:
        modulation = self._linear(linear, self.vec)
        modulation = self.graph.op("Unsqueeze", modulation, self.graph.integers(1))
        return self.graph.node("Split", (modulation,), count, axis=2, num_outputs=count)

    def _linear(self, name: str, x: ir.Value) -> ir.Value:
        op = self.graph.op
        weight = op("Transpose", self._weight(name), name=f"{name}/Transpose", perm=[1, 0])
        y = op("MatMul", x, weight, name=f"{name}/MatMul")
        if self.graph.has(f"{name}.bias"):
            y = op("Add", y, self._high_precision(f"{name}.bias"), name=f"{name}/Bias")
        return y

    def _weight(self, name: str) -> ir.Value:
        stored = self.graph.linear_format(name)
        if stored == "nvfp4":
            raise TransformerExportError(self.checkpoint.name, name)
        if stored == "bf16":
            return self._high_precision(f"{name}.weight")
        # ComfyUI's FP8 layout: one scale, and the input stays in high precision
        weight = self.graph.stored(f"{name}.weight")
        scale = self._high_precision(f"{name}.weight_scale")
        return self.graph.op("DequantizeLinear", weight, scale, name=f"{name}/DQ_weight")

    def _high_precision(self, tensor: str) -> ir.Value:
        # outside of blocks a checkpoint keeps its source's type
        stored = self.graph.stored(tensor)
        if stored.dtype == self.graph.high_precision:
            return stored
        to = int(self.graph.high_precision)
        return self.graph.op("Cast", stored, name=f"{tensor}/Cast", to=to)
