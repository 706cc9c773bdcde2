"""The quantized model as one module that can be trained, sharded and recomputed block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..calibration import CalibrationSample, CalibrationSet, SampleState, embedded_samples
from ..e2m1 import decode_packed
from ..emulation import EmulatedLinear, linear_parts
from ..flux.config import FluxConfig, block_linears
from ..flux.model import Embedders, LastLayer, patchify
from ..nvfp4 import NVFP4_BLOCK
from ..quantized_checkpoint import QuantizedCheckpoint
from ..sources.source import FluxSource
from ..stack import Block, block_with_weights, check_finite, last_layer, run_block
from .rounding import round_e2m1
from .states import batched
from .trainable import TrainableNVFP4Linear, trainable_block


class StudentBlock(nn.Module):
    """A block together with its modulation: what is gathered, run and recomputed as one.

    FSDP gathers the parameters of a module for its ``forward`` alone, and blocks of FLUX are called
    with modulation vectors that their own parameters give.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(
        self,
        img: Tensor,
        txt: Tensor | None,
        vec: Tensor,
        cos: Tensor,
        sin: Tensor,
        shared_mods: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Run the block and keep its input only: the rest is computed again going back.

        Args:
            img: See ``SampleState``, as the others.
            txt: As above.
            vec: As above.
            cos: As above.
            sin: As above.
            shared_mods: As above.

        Returns:
            ``img`` and ``txt`` of a double block, all tokens of a single block.
        """
        state = (img, txt, vec, cos, sin, shared_mods)
        # below the hooks of FSDP, so that what is computed again finds the parameters gathered
        return checkpoint(self._run, *state, use_reentrant=False, preserve_rng_state=False)

    def _run(self, *state: Any) -> tuple[Tensor, ...]:
        after = run_block(self.block, SampleState(*state))
        return (after.img,) if after.txt is None else (after.img, after.txt)


class Student(Embedders):
    """A quantized FLUX: embedders and final layer of the original, blocks that round as plans do.

    Attributes:
        config: The model's sizes.
        blocks: In the order they run.
        final_layer: See ``Flux``.
    """

    def __init__(self, config: FluxConfig, blocks: Sequence[Block], final_layer: LastLayer) -> None:
        super().__init__(config)
        self.config = config
        self.blocks = nn.ModuleList(StudentBlock(block) for block in blocks)
        self.final_layer = final_layer

    def forward(self, samples: Sequence[CalibrationSample]) -> Tensor:
        """Predict the velocity of samples of equal shapes.

        Returns:
            ``[B, N, patch**2 * C]`` as ``CalibrationSample.velocity_patches``, in the type of the
            embedders.
        """
        together = CalibrationSet(tuple(samples), seed=0, timesteps=1)
        state = batched(embedded_samples(together, self, self.config))
        img, txt = state.img, state.txt
        for block in self.blocks:
            img, *rest = block(img, txt, state.vec, state.cos, state.sin, state.shared_mods)
            txt = rest[0] if rest else None
        text = samples[0].conditioning.context.shape[1]
        image = patchify(samples[0].latent, self.config.patch_size).shape[1]
        velocity: Tensor = self.final_layer(img[:, text : text + image], state.vec)
        return velocity


def quantized_student(
    source: FluxSource, quantized: QuantizedCheckpoint, dtype: torch.dtype
) -> Student:
    """Make the student that computes what a quantized checkpoint does, on the CPU.

    Values behind codes are in fp32, and what is not trained is in ``dtype``. Modulation is the
    original's, however the checkpoint stores it.

    Args:
        source: The original.
        quantized: Made from it.
        dtype: Type to compute in.
    """
    config = source.config
    blocks = [student_block(name, source, quantized, dtype) for name in config.block_names]
    student = Student(config, blocks, last_layer(source, "cpu", dtype))
    tensors = source.tensors(Embedders(config).state_dict())
    check_finite(tensors)
    student.load_state_dict(tensors, strict=False)
    for name in tensors:
        parameter = student.get_parameter(name)
        parameter.requires_grad_(False).data = parameter.data.to(dtype)
    return student


def student_block(
    name: str, source: FluxSource, quantized: QuantizedCheckpoint, dtype: torch.dtype
) -> Block:
    """Make one block of the student; see ``quantized_student``."""
    tensors = source.submodule(name)
    original = block_with_weights(name, source.config, tensors, dtype)
    weights = {linear: tensors[f"{linear}.weight"] for linear in block_linears(name)}
    stored = quantized.block_tensors(name)
    student = trainable_block(original, weights, stored)
    for linear in block_linears(name):
        module: Any = student.get_submodule(linear)
        if isinstance(module, TrainableNVFP4Linear):
            _start_from_stored(module, linear_parts(linear, stored))
        elif isinstance(module, EmulatedLinear):
            _make_parameters(module)
    return student


@torch.no_grad()
def _start_from_stored(module: TrainableNVFP4Linear, parts: Mapping[str, Tensor]) -> None:
    """Begin where an earlier training ended: there, the original weight has other codes."""
    codes = decode_packed(parts["weight"]).unflatten(-1, (-1, NVFP4_BLOCK))
    # zero has two codes, and minus zero itself is given that of plus zero
    below_zero = -torch.finfo(torch.float32).tiny
    codes = codes.masked_fill((codes == 0) & codes.signbit(), below_zero)
    rounded = round_e2m1(module.steps)
    same = (rounded == round_e2m1(codes)) & (rounded.signbit() == codes.signbit())
    module.steps.copy_(torch.where(same, module.steps, codes))
    if module.bias is not None:
        module.bias.copy_(parts["bias"])


def _make_parameters(linear: EmulatedLinear) -> None:
    """Make the weight of a Linear that is not trained move and shard with the model."""
    for name in ("weight", "bias"):
        tensor = getattr(linear, name)
        if tensor is not None:
            delattr(linear, name)
            setattr(linear, name, nn.Parameter(tensor.detach(), requires_grad=False))
