"""Training through the whole of quantization: what is written, resumed and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flux_fp4.quant.calibration import CalibrationSet
from flux_fp4.quant.emulation import emulated_block
from flux_fp4.quant.errors.calibration import CalibrationError
from flux_fp4.quant.native_checkpoint import save_native_checkpoint
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from flux_fp4.quant.recipe import QuantizeOptions, TrainingOptions, named_recipe
from flux_fp4.quant.sources.source import open_source
from flux_fp4.quant.sqnr import SQNR
from flux_fp4.quant.stack import block_with_weights, embed, run_block, tokens
from quantize_tiny import quantize, with_recipe
from tiny_flux import ignore_progress, random_samples

STEPS = 30


def trained_options(**changes: float) -> QuantizeOptions:
    training = TrainingOptions(steps=STEPS, **changes)  # type: ignore[arg-type]
    recipe = named_recipe("nvfp4-qat").model_copy(update={"training": training})
    return QuantizeOptions(recipe=recipe)


@pytest.fixture(scope="module")
def samples() -> CalibrationSet:
    return random_samples(pictures=8, timesteps=4)


@pytest.fixture(scope="module")
def trained(
    source: Path, samples: CalibrationSet, tmp_path_factory: pytest.TempPathFactory
) -> QuantizedCheckpoint:
    path = tmp_path_factory.mktemp("trained") / "tiny" / "tiny.safetensors"
    return quantize(source, path, trained_options(), samples)


def output_db(source: Path, quantized: QuantizedCheckpoint, samples: CalibrationSet) -> float:
    """SQNR of the tokens behind the last block, quantized blocks behind quantized blocks."""
    opened = open_source(source)
    config, ratio = opened.config, SQNR()
    with torch.inference_mode():
        for state in embed(opened, samples, "cpu", torch.float32):
            expected = actual = state
            for name in config.block_names:
                weights = opened.submodule(name)
                block = block_with_weights(name, config, weights, torch.float32)
                expected = run_block(block, expected)
                actual = run_block(emulated_block(block, quantized.block_tensors(name)), actual)
            ratio.add(tokens(expected) - tokens(state), tokens(actual) - tokens(state))
    return ratio.db


def test_training_brings_other_samples_nearer(
    source: Path, samples: CalibrationSet, trained: QuantizedCheckpoint, tmp_path: Path
) -> None:
    untrained = quantize(source, tmp_path / "q.safetensors", with_recipe("nvfp4-mse"), samples)
    other = random_samples(pictures=2, seed=77)
    before, after = (output_db(source, one, other) for one in (untrained, trained))
    assert after > before + 0.1, f"{before:.2f} to {after:.2f} dB"


def test_report_says_what_training_did(trained: QuantizedCheckpoint) -> None:
    for block in trained.metadata.blocks:
        assert block.training is not None
        assert block.training.steps == STEPS
        text = f"{block.name}: {block.training.before_db:.2f} to {block.training.after_db:.2f} dB"
        assert block.training.helped, text


def test_trained_values_can_be_saved_for_comfyui(
    trained: QuantizedCheckpoint, tmp_path: Path
) -> None:
    save_native_checkpoint(trained, tmp_path / "native.safetensors", ignore_progress)
    native = open_source(tmp_path / "native.safetensors")
    for report in trained.metadata.linears:
        packed = native.packed(report.name)
        assert packed is not None
        for part, tensor in (("weight", packed.packed), ("weight_scale", packed.block_scale)):
            stored = trained.load(f"{report.name}.{part}")
            assert torch.equal(tensor.view(torch.uint8), stored.view(torch.uint8))
        bias = f"{report.name}.bias"
        assert torch.equal(native.tensors([bias])[bias], trained.load(bias))


def test_sizes_are_those_of_an_untrained_checkpoint(
    source: Path, trained: QuantizedCheckpoint, quantized: QuantizedCheckpoint
) -> None:
    assert trained.tensors.keys() == quantized.tensors.keys()
    for name, stored in trained.tensors.items():
        assert (stored.dtype, stored.shape) == (
            quantized.tensors[name].dtype,
            quantized.tensors[name].shape,
        )


class UserCancelError(Exception):
    """A user's cancel."""


def test_cancelled_training_goes_on_to_the_same_bytes(
    source: Path, samples: CalibrationSet, trained: QuantizedCheckpoint, tmp_path: Path
) -> None:
    seen: list[str] = []

    def cancel_in_last_block(phase: str, done: int, total: int) -> None:
        seen.append(phase)
        if phase == "Training single_blocks.1" and seen.count(phase) == STEPS // 2:
            raise UserCancelError

    path = tmp_path / "tiny" / "tiny.safetensors"
    with pytest.raises(UserCancelError):
        quantize(source, path, trained_options(), samples, cancel_in_last_block)
    assert not path.exists()
    assert not list(tmp_path.rglob("*.tokens"))
    leftover = path.parent / ".tiny.scratch" / "original" / "0.tokens"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"of a run that was killed")
    seen.clear()
    quantize(source, path, trained_options(), samples, lambda phase, *_: seen.append(phase))
    assert {phase for phase in seen if phase.startswith("Training")} == {"Training single_blocks.1"}
    assert path.read_bytes() == trained.path.read_bytes()
    assert not list(tmp_path.rglob("*.tokens"))


def test_block_that_training_spoils_stays_untrained(
    source: Path, samples: CalibrationSet, tmp_path: Path
) -> None:
    spoiled = quantize(
        source, tmp_path / "a.safetensors", trained_options(learning_rate=1), samples
    )
    untrained = quantize(source, tmp_path / "b.safetensors", with_recipe("nvfp4-mse"), samples)
    for block in spoiled.metadata.blocks:
        assert block.training is not None
        assert not block.training.helped
    for name in untrained.tensors:
        if name.endswith((".weight", ".weight_scale")):
            a, b = spoiled.load(name), untrained.load(name)
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


def test_one_picture_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="training has 1 picture"):
        quantize(source, tmp_path / "q.safetensors", trained_options(), random_samples(pictures=1))
