"""Distillation in one process: what is gained, written, resumed and refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_tiny import (
    BATCH,
    NAME,
    SAVE_EVERY,
    STEPS,
    TRAJECTORIES,
    Distilled,
    distill_here,
    distillation,
    logged,
)
from flux_fp4.quant.calibration import CalibrationSample, CalibrationSet
from flux_fp4.quant.emulation import emulated_block
from flux_fp4.quant.errors.calibration import CalibrationError
from flux_fp4.quant.errors.training import (
    ForeignRunError,
    ForeignSourceError,
    LaunchError,
    LossNotFiniteError,
    NoGainError,
)
from flux_fp4.quant.onnx_export import export_blocks
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint, up_to_date_checkpoint
from flux_fp4.quant.recipe import TrainingOptions
from flux_fp4.quant.sources.source import FluxSource, open_source
from flux_fp4.quant.sqnr import SQNR
from flux_fp4.quant.stack import block_with_weights, embed, last_layer, run_block
from flux_fp4.quant.summary import quantized_summary
from flux_fp4.quant.training.distillation import distilled_before
from flux_fp4.quant.training.trainer import Trainer
from flux_fp4.quant.training.trajectories import distinct_prompts, sample_trajectories
from tiny_flux import ignore_progress, random_flux, save_flux

HELD_OUT = 7
"""Number of the prompt that is judged by, of eight."""


def velocity_db(
    source: FluxSource, quantized: QuantizedCheckpoint, points: Sequence[CalibrationSample]
) -> float:
    """SQNR of the velocity that the blocks of a checkpoint predict, emulated one after another."""
    ratio = SQNR()
    layer = last_layer(source, "cpu", torch.float32)
    states = embed(source, CalibrationSet(tuple(points), 0, 1), "cpu", torch.float32)
    with torch.no_grad():
        for name in source.config.block_names:
            block = block_with_weights(name, source.config, source.submodule(name), torch.float32)
            emulated = emulated_block(block, quantized.block_tensors(name))
            states = [run_block(emulated, state) for state in states]
        for point, state in zip(points, states, strict=True):
            target = point.velocity_patches(source.config.patch_size)
            start = point.conditioning.context.shape[1]
            ratio.add(target, layer(state.img[:, start : start + target.shape[1]], state.vec))
    return ratio.db


def test_a_prompt_not_learned_from_gains(inputs: Path, distilled: Distilled) -> None:
    work = distillation(inputs, distilled.models)
    prompts = distinct_prompts(work.samples)
    assert len(prompts) == HELD_OUT + 1
    other = TRAJECTORIES.model_copy(update={"seed": 77})
    # enough points that their noise, some tenths of a dB each, does not decide
    indices = range(HELD_OUT, TRAJECTORIES.count, len(prompts))
    sampled = sample_trajectories(work.source, prompts, indices, other, "cpu", torch.float32, int)
    assert {prompt for prompt, _ in sampled} == {HELD_OUT}
    points = [point for _, point in sampled]
    before = velocity_db(work.source, work.base, points)
    after = velocity_db(work.source, distilled.checkpoint, points)
    assert after > before + 0.1, f"{before:.2f} to {after:.2f} dB"


def test_metadata_say_what_was_done(inputs: Path, distilled: Distilled) -> None:
    work = distillation(inputs, distilled.models)
    metadata, before = distilled.checkpoint.metadata, work.base.metadata
    report = metadata.distillation
    assert report is not None
    assert (report.steps, report.batch, report.held_out) == (STEPS, BATCH, 1)
    # one trajectory in eight is of the held-out prompt
    assert report.samples == TRAJECTORIES.count * HELD_OUT // (HELD_OUT + 1) * TRAJECTORIES.kept
    assert report.base_digest == before.content_digest != metadata.content_digest
    measured = logged(distilled.models, "sqnr_db")
    assert len(measured) == 1 + STEPS // SAVE_EVERY
    best = max(measured[1:])
    assert (report.before_db, report.after_db) == pytest.approx((measured[0], best))
    assert report.best_step == SAVE_EVERY * measured.index(best)
    assert metadata.recipe == "nvfp4-mse-qad"
    assert report.reports == "measured"
    for linear, former in zip(metadata.linears, before.linears, strict=True):
        assert linear.input_amax == former.input_amax
        # codes moved away from the original's weight, so its weight is further off
        assert linear.weight_sqnr_db < former.weight_sqnr_db
    assert f"distilled for 24 steps, best after {report.best_step}" in quantized_summary(
        distilled.checkpoint
    )


def test_only_what_is_trained_changes(inputs: Path, distilled: Distilled) -> None:
    base = distillation(inputs, distilled.models).base
    changed = distilled.checkpoint
    assert changed.tensors.keys() == base.tensors.keys()
    # so few steps may leave scales and biases where they round to what they were
    trained = (".weight_scale", ".bias")
    for name, stored in base.tensors.items():
        assert (changed.tensors[name].dtype, changed.tensors[name].shape) == (
            stored.dtype,
            stored.shape,
        )
        same = torch.equal(
            changed.load(name).view(-1).view(torch.uint8),
            base.load(name).view(-1).view(torch.uint8),
        )
        quantized = name.rpartition(".")[0] + ".input_scale" in base.tensors
        if quantized and name.endswith(".weight"):
            assert not same, name
        elif not (quantized and name.endswith(trained)):
            assert same, name


def test_result_can_be_exported(distilled: Distilled) -> None:
    assert len(export_blocks(distilled.checkpoint.path, ignore_progress)) == 3


def test_quantizing_again_is_not_skipped(inputs: Path, distilled: Distilled) -> None:
    work, metadata = distillation(inputs, distilled.models), distilled.checkpoint.metadata
    path, digest = distilled.checkpoint.path, metadata.calibration_digest
    assert up_to_date_checkpoint(work.source, path, metadata.options, digest) is None


def test_distilling_again_is_skipped(inputs: Path, distilled: Distilled) -> None:
    same = distilled_before(distillation(inputs, distilled.models))
    assert same is not None
    assert same.metadata == distilled.checkpoint.metadata
    assert distilled_before(distillation(inputs, distilled.models, seed=1)) is None
    # what only decides how it is computed
    assert distilled_before(distillation(inputs, distilled.models, accumulate=2)) is not None


class StopError(Exception):
    """A user's cancel."""


def stop_at(step: int) -> Any:
    def progress(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("Distilling", step):
            raise StopError

    return progress


def test_cancelled_run_goes_on_to_the_same_bytes(
    inputs: Path, distilled: Distilled, models: Path
) -> None:
    work = distillation(inputs, models)
    with pytest.raises(StopError):
        distill_here(work, stop_at(SAVE_EVERY + 3))
    assert not work.destination.exists()
    assert [path.name for path in work.logs.glob("step-*")] == [f"step-{SAVE_EVERY:08d}"]
    steps: list[int] = []
    distill_here(work, lambda phase, done, total: steps.append(done) if phase[0] == "D" else None)
    assert steps == list(range(SAVE_EVERY, STEPS))
    assert work.destination.read_bytes() == distilled.checkpoint.path.read_bytes()
    assert logged(models, "loss") == logged(distilled.models, "loss")
    # what is over leaves its log
    assert [path.name for path in work.logs.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize("interrupted", [False, True])
def test_best_state_is_kept(
    inputs: Path, models: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    # before, after each 8 steps, and what was kept
    values = iter([1.0, 3.0, 2.0, 1.0, 2.5, 3.0] if interrupted else [1.0, 3.0, 2.0, 2.5, 3.0])
    averages = []

    def sqnr_db(self: Trainer) -> float:
        found = self.state.tensors()["average"]
        averages.append({name: tensor.clone() for name, tensor in found.items()})
        return next(values)

    monkeypatch.setattr(Trainer, "sqnr_db", sqnr_db)
    work = distillation(inputs, models)
    if interrupted:
        with pytest.raises(StopError):
            distill_here(work, stop_at(2 * SAVE_EVERY + 3))
        states = sorted(path.name for path in work.logs.glob("step-*"))
        assert states == [f"step-{step:08d}" for step in (SAVE_EVERY, 2 * SAVE_EVERY)]
    report = distill_here(work).metadata.distillation
    assert report is not None
    assert (report.best_step, report.after_db) == (SAVE_EVERY, 3.0)
    first, later, kept = averages[1], averages[-2], averages[-1]
    assert all(torch.equal(kept[name], first[name]) for name in kept)
    assert not any(torch.equal(kept[n], later[n]) for n in kept if n.endswith(".steps"))


def test_parts_of_a_batch_add_up(inputs: Path, distilled: Distilled, models: Path) -> None:
    work = distillation(inputs, models, accumulate=4)
    with pytest.raises(StopError):
        distill_here(work, stop_at(4))
    expected = logged(distilled.models, "loss")[:4]
    assert logged(models, "loss") == pytest.approx(expected, rel=1e-5)


def test_run_of_other_options_is_not_gone_on_with(inputs: Path, models: Path) -> None:
    work = distillation(inputs, models)
    with pytest.raises(StopError):
        distill_here(work, stop_at(SAVE_EVERY))
    slower = TrainingOptions(steps=STEPS, learning_rate=1e-3)
    other = replace(work, options=work.options.model_copy(update={"training": slower}))
    with pytest.raises(ForeignRunError, match=r"learning_rate 0\.003, now it is 0\.001"):
        distill_here(other)
    with pytest.raises(StopError):
        distill_here(other, stop_at(0), restart=True)


def test_loss_that_is_not_finite_stops(
    inputs: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, calls = Trainer._losses, iter(range(100))

    def broken(self: Trainer, indices: Sequence[int]) -> torch.Tensor:
        return losses(self, indices) * (float("nan") if next(calls) == SAVE_EVERY + 1 else 1)

    monkeypatch.setattr(Trainer, "_losses", broken)
    work = distillation(inputs, models)
    with pytest.raises(LossNotFiniteError) as error:
        distill_here(work)
    assert error.value.step == SAVE_EVERY + 2
    assert (work.logs / f"step-{SAVE_EVERY:08d}").is_dir()


def test_worse_model_is_not_written(inputs: Path, models: Path) -> None:
    training = TrainingOptions(steps=4, learning_rate=1, relative_learning_rate=1)
    work = distillation(inputs, models, training=training)
    with pytest.raises(NoGainError) as error:
        distill_here(work)
    assert error.value.after_db < error.value.before_db
    assert not work.destination.exists()


def test_other_originals_are_refused(inputs: Path, models: Path, tmp_path: Path) -> None:
    other = save_flux(random_flux(seed=5), tmp_path / "other.safetensors")
    with pytest.raises(ForeignSourceError, match=r"'tiny\.safetensors' that is not the given"):
        distill_here(distillation(inputs, models), source=open_source(other))


def test_one_prompt_is_refused(inputs: Path, models: Path) -> None:
    work = distillation(inputs, models)
    first = work.samples.samples[:2]
    with pytest.raises(CalibrationError, match="1 prompt"):
        distill_here(work, samples=replace(work.samples, samples=first))


def test_batch_that_cannot_be_divided_is_refused(inputs: Path, models: Path) -> None:
    with pytest.raises(LaunchError, match="multiple of 3"):
        distill_here(distillation(inputs, models, accumulate=3))


def test_lost_statistics_leave_reports_as_they_were(
    inputs: Path, models: Path, tmp_path: Path
) -> None:
    work = distillation(inputs, models, training=TrainingOptions(steps=2))
    written = distill_here(work, statistics=tmp_path / "none")
    assert written.metadata.distillation is not None
    assert written.metadata.distillation.reports == "carried"
    assert written.metadata.linears == work.base.metadata.linears
    assert written.name == NAME
