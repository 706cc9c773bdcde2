"""The student computes what the quantized checkpoint does, wherever it came from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flux_fp4.quant.calibration import CalibrationSample, CalibrationSet
from flux_fp4.quant.emulation import emulated_block
from flux_fp4.quant.flux.config import block_linears
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from flux_fp4.quant.recipe import FormatOverride, QuantizeOptions, TrainingOptions, named_recipe
from flux_fp4.quant.sources.source import FluxSource, open_source
from flux_fp4.quant.stack import block_with_weights, embed, last_layer, run_block
from flux_fp4.quant.training.ema import trained_parameters
from flux_fp4.quant.training.student import Student, quantized_student
from flux_fp4.quant.training.trainable import trained_tensors
from quantize_tiny import quantize, with_recipe
from tiny_flux import TINY, TINY_FLUX2, random_flux, random_samples, save_flux
from torch import Tensor


def recipe(name: str) -> QuantizeOptions:
    if name == "mixed":
        override = FormatOverride(linears=("*.linear2", "*.img_mlp.2"), format="fp8")
        kept = FormatOverride(linears=("*.txt_attn.proj",), format="bf16")
        mixed = named_recipe("nvfp4-mse").model_copy(update={"overrides": (override, kept)})
        return QuantizeOptions(recipe=mixed)
    if name == "nvfp4-qat":
        training = TrainingOptions(steps=8)
        trained = named_recipe(name).model_copy(update={"training": training})
        return QuantizeOptions(recipe=trained)
    return with_recipe(name)


def emulated(
    source: FluxSource, quantized: QuantizedCheckpoint, samples: CalibrationSet
) -> list[Tensor]:
    layer = last_layer(source, "cpu", torch.float32)
    states = embed(source, samples, "cpu", torch.float32)
    for name in source.config.block_names:
        block = block_with_weights(name, source.config, source.submodule(name), torch.float32)
        twin = emulated_block(block, quantized.block_tensors(name))
        states = [run_block(twin, state) for state in states]
    text = samples.samples[0].conditioning.context.shape[1]
    return [layer(state.img[:, text:], state.vec) for state in states]


CASES = {
    "nvfp4-svdquant-r16": TINY,
    "nvfp4-qat": TINY,
    "mixed": TINY,
    "nvfp4-max": TINY_FLUX2,
}


@pytest.mark.parametrize("name", CASES)
def test_student_is_the_checkpoint(tmp_path: Path, name: str) -> None:
    config = CASES[name]
    path = save_flux(random_flux(config), tmp_path / "tiny.safetensors")
    samples = random_samples(config, pictures=2)
    quantized = quantize(path, tmp_path / "q" / "q.safetensors", recipe(name), samples)
    source = open_source(path)
    student = quantized_student(source, quantized, torch.float32)
    with torch.no_grad():
        expected = emulated(source, quantized, samples)
        # one by one: a sum in another order could put a value on the other side of a rounding
        for sample, velocity in zip(samples.samples, expected, strict=True):
            torch.testing.assert_close(student([sample]), velocity, rtol=1e-4, atol=1e-4)
    check_packed(student, quantized)
    check_gradients(student, samples.samples)


def check_packed(student: Student, quantized: QuantizedCheckpoint) -> None:
    """Nothing was trained, so what is packed is what was there, an earlier training included."""
    for block, name in zip(student.blocks, quantized.metadata.config.block_names, strict=True):
        stored = quantized.block_tensors(name)
        for part, tensor in trained_tensors(block.block).items():
            before = stored[part]
            assert torch.equal(
                tensor.view(-1).view(torch.uint8), before.view(-1).view(torch.uint8)
            ), part


def check_gradients(student: Student, samples: tuple[CalibrationSample, ...]) -> None:
    """They reach every parameter, through Linears in FP8 too, and nothing else."""
    student(samples).square().mean().backward()
    trained = trained_parameters(student)
    assert trained
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        share = (parameter.grad != 0).float().mean().item()
        assert share > 0.5, f"{name}: {share:.2f} of the gradient"
    linears = {name.rpartition(".")[0].partition(".block.")[2] for name in trained}
    assert linears <= {*block_linears("double_blocks.0"), *block_linears("single_blocks.0")}


def test_only_inputs_of_blocks_are_kept(source: Path, quantized: QuantizedCheckpoint) -> None:
    student = quantized_student(open_source(source), quantized, torch.float32)
    samples = random_samples(pictures=2).samples
    kept: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        student(samples)
    tokens = len(samples) * (12 + 10) * TINY.hidden_size
    # the final layer and joins between the streams keep a few more
    assert sum(kept) < 8 * tokens, f"{sum(kept) / tokens:.1f} times the tokens"
