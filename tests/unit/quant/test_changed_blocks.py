"""Blocks quantized again from changed weights, against the checkpoint they stand in for."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
import torch
from flux_fp4.quant.changed_blocks import quantize_changed_blocks
from flux_fp4.quant.errors.calibration import StatisticsMissingError
from flux_fp4.quant.errors.export import OnnxExportMissingError
from flux_fp4.quant.flux.config import FluxConfig, block_linears
from flux_fp4.quant.native_checkpoint import save_native_checkpoint
from flux_fp4.quant.onnx_export import export_blocks, exported_blocks
from flux_fp4.quant.progress import Progress
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint, is_in_plan
from flux_fp4.quant.sources.source import FluxSource, open_source
from flux_fp4.quant.statistics_files import StatisticsFolder
from merged_source import MergedSource, random_changes, save_merged
from quantize_tiny import quantize, with_recipe
from tiny_flux import TINY, TINY_FLUX2, ignore_progress, random_flux, random_samples, save_flux

DOUBLE, SINGLE = "double_blocks.0", "single_blocks.1"
CHANGED = (f"{DOUBLE}.img_attn.qkv", f"{DOUBLE}.txt_mlp.2", f"{SINGLE}.linear1")
RECIPES = ("nvfp4-max", "nvfp4-mse", "nvfp4-awq", "nvfp4-svdquant-r16", "nvfp4-fp8mix", "fp8")


class Base:
    """A quantized checkpoint, what it was made from, and its statistics."""

    def __init__(self, folder: Path, recipe: str, config: FluxConfig = TINY) -> None:
        self.file = save_flux(random_flux(config), folder / "source.safetensors")
        self.statistics = folder / "statistics"
        path = folder / "base" / "base.safetensors"
        options = with_recipe(recipe, modulation="nvfp4")
        samples = random_samples(config)
        self.header = quantize(self.file, path, options, samples, statistics=self.statistics)
        self.source = open_source(self.file)

    def again(
        self,
        source: FluxSource,
        path: Path,
        blocks: tuple[str, ...] = (DOUBLE, SINGLE),
        progress: Progress = ignore_progress,
    ) -> QuantizedCheckpoint:
        return quantize_changed_blocks(
            source, self.header, blocks, path, self.statistics, progress, dtype=torch.float32
        )


@pytest.fixture(scope="module", params=RECIPES)
def every_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(tmp_path_factory.mktemp("base"), request.param)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(tmp_path_factory.mktemp("base"), "nvfp4-max")


def assert_equal_blocks(found: QuantizedCheckpoint, expected: QuantizedCheckpoint) -> None:
    """Every plan tensor of the blocks in `found` is there and has the same bytes."""
    for block in found.metadata.block_names:
        tensors, wanted = found.block_tensors(block), expected.block_tensors(block)
        assert tensors.keys() == {name for name in wanted if is_in_plan(f"{block}.{name}")}
        for name, tensor in tensors.items():
            assert tensor.dtype == wanted[name].dtype
            assert torch.equal(stored_bytes(tensor), stored_bytes(wanted[name])), name


def stored_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def test_without_a_change_the_base_comes_out_bit_for_bit(every_base: Base, tmp_path: Path) -> None:
    found = every_base.again(every_base.source, tmp_path / "blocks.safetensors")
    assert_equal_blocks(found, every_base.header)
    reports = {report.name: report for report in every_base.header.metadata.linears}
    assert len(found.metadata.linears) == 10
    assert all(reports[report.name] == report for report in found.metadata.linears)


def test_flux2_comes_out_bit_for_bit(tmp_path: Path) -> None:
    base = Base(tmp_path, "nvfp4-max", TINY_FLUX2)
    found = base.again(base.source, tmp_path / "blocks.safetensors")
    assert_equal_blocks(found, base.header)


def test_source_in_nvfp4_keeps_the_codes_of_what_did_not_change(base: Base, tmp_path: Path) -> None:
    native = tmp_path / "native.safetensors"
    save_native_checkpoint(base.header, native, ignore_progress)
    lend_statistics(base, native, tmp_path / "statistics")
    options = base.header.metadata.options
    path = tmp_path / "again" / "again.safetensors"
    again = quantize(native, path, options, statistics=tmp_path / "statistics")
    source = open_source(native)
    changes = random_changes(source, CHANGED[0])
    found = quantize_changed_blocks(
        MergedSource(source, changes),
        again,
        (DOUBLE,),
        tmp_path / "blocks.safetensors",
        tmp_path / "statistics",
        ignore_progress,
    )
    for linear in block_linears(DOUBLE):
        name = f"{DOUBLE}.{linear}.weight"
        kept = torch.equal(found.load(name), again.load(name))
        assert kept == (f"{DOUBLE}.{linear}" not in changes), name


def test_lora_comes_out_as_from_a_merged_checkpoint(base: Base, tmp_path: Path) -> None:
    changes = random_changes(base.source, *CHANGED)
    found = base.again(MergedSource(base.source, changes), tmp_path / "blocks.safetensors")
    merged = save_merged(base.file, changes, tmp_path / "merged.safetensors")
    lend_statistics(base, merged, tmp_path / "statistics")
    options = base.header.metadata.options
    expected = quantize(
        merged,
        tmp_path / "merged" / "merged.safetensors",
        options,
        statistics=tmp_path / "statistics",
    )
    assert_equal_blocks(found, expected)
    weight = f"{CHANGED[0]}.weight"
    assert not torch.equal(found.load(weight), base.header.load(weight))


def lend_statistics(base: Base, merged: Path, root: Path) -> None:
    """Store the base's statistics as those of the merged checkpoint, which would measure others."""
    calibration = random_samples().digest()
    own = StatisticsFolder(base.statistics, base.source.digest(), calibration)
    lent = StatisticsFolder(root, open_source(merged).digest(), calibration)
    for block in TINY.block_names:
        statistics = own.read(block)
        assert statistics is not None
        lent.write(block, statistics)
    lent.write_velocity_sqnr_db(1.0)


def test_file_holds_the_touched_blocks_only(base: Base, tmp_path: Path) -> None:
    found = base.again(MergedSource(base.source, {}), tmp_path / "blocks.safetensors", (SINGLE,))
    assert {name.rsplit(".linear", 1)[0][: len(SINGLE)] for name in found.tensors} == {SINGLE}
    assert not [name for name in found.tensors if "modulation" in name]
    metadata = found.metadata
    assert metadata.base_digest == base.header.metadata.content_digest != metadata.content_digest
    assert metadata.source_digest == "merged"
    assert metadata.block_names == (SINGLE,)
    assert metadata.options == base.header.metadata.options


def test_interrupted_work_goes_on_after_the_finished_block(base: Base, tmp_path: Path) -> None:
    source = MergedSource(base.source, random_changes(base.source, *CHANGED))
    path = tmp_path / "blocks.safetensors"

    def cancel(phase: str, done: int, total: int) -> None:
        if phase == f"Quantizing {SINGLE}":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        base.again(source, path, progress=cancel)
    assert not path.exists()
    phases: list[str] = []
    found = base.again(source, path, progress=lambda phase, done, total: phases.append(phase))
    assert phases[0] == f"Keeping {DOUBLE}, finished earlier"
    assert_equal_blocks(found, base.again(source, tmp_path / "whole.safetensors"))


def test_other_change_takes_nothing_of_unfinished_work(base: Base, tmp_path: Path) -> None:
    path = tmp_path / "blocks.safetensors"
    changes = random_changes(base.source, *CHANGED)

    def cancel(phase: str, done: int, total: int) -> None:
        if phase == f"Quantizing {SINGLE}":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        base.again(MergedSource(base.source, changes, "first"), path, progress=cancel)
    half = MergedSource(base.source, {n: c / 2 for n, c in changes.items()}, "second")
    phases: list[str] = []
    base.again(half, path, progress=lambda phase, done, total: phases.append(phase))
    assert not [phase for phase in phases if phase.startswith("Keeping")]


@pytest.mark.parametrize("damage", ["gone", "of other samples"])
def test_missing_statistics_are_named(base: Base, tmp_path: Path, damage: str) -> None:
    statistics = tmp_path / "statistics"
    shutil.copytree(base.statistics, statistics)
    (file,) = statistics.glob(f"*/{SINGLE}.safetensors")
    if damage == "gone":
        file.unlink()
    else:
        shutil.copyfile(file.with_name(f"{DOUBLE}.safetensors"), file)
    with pytest.raises(StatisticsMissingError) as error:
        quantize_changed_blocks(
            base.source, base.header, (DOUBLE, SINGLE), tmp_path / "x", statistics, ignore_progress
        )
    assert str(error.value) == (
        "'base' cannot be changed: what calibration measured in 'single_blocks.1' is gone from the "
        "folder '.statistics' of models/flux_fp4. Choose 'runtime' as 'lora' in 'Load FLUX FP4 "
        "Engine', which needs no statistics. Or collect them again: quantize the same checkpoint "
        "with the same samples in 'Quantize FLUX to FP4' under another name."
    )


def test_export_names_the_base_and_the_change(base: Base, tmp_path: Path) -> None:
    path = tmp_path / "blocks.safetensors"
    found = base.again(MergedSource(base.source, {}), path)
    with pytest.raises(OnnxExportMissingError, match="is missing"):
        exported_blocks(path)
    paths = export_blocks(path, ignore_progress)
    assert paths == exported_blocks(path)
    # a LoRA is in the weights, so there is no form with factors
    forms = {f"{block}{form}" for block in (DOUBLE, SINGLE) for form in ("", ".mask")}
    assert {file.stem for file in tmp_path.glob("*.onnx")} == forms
    model = onnx.load(paths[0], load_external_data=False)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["flux_fp4.checkpoint_digest"] == base.header.metadata.content_digest
    assert properties["flux_fp4.changed_digest"] == found.metadata.content_digest
    other = random_changes(base.source, *CHANGED)
    base.again(MergedSource(base.source, other, "other"), path)
    with pytest.raises(OnnxExportMissingError, match="is of another checkpoint"):
        exported_blocks(path)
