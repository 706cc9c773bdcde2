"""LoRA mode "baked" in ComfyUI: merged, quantized again and run, against stock FLUX."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_in_process import import_comfyui
from flux_fp4.quant.errors.calibration import StatisticsMissingError
from flux_fp4.quant.onnx_export import export_blocks
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from flux_fp4.quant.sources.source import open_source
from flux_fp4.quant.sqnr import sqnr_db
from flux_fp4.quant.weight_factors import stored_weight
from flux_fp4.trt_runtime.builder import build_engine
from flux_fp4.trt_runtime.manifest import load_manifest
from flux_fp4.trt_runtime.selection import BakedBlocks, Selection
from flux_fp4.trt_runtime.spec import BuildSpec, ShapeProfile
from flux_fp4.trt_runtime.variant_plans import selected_plans
from quantize_tiny import quantize, with_recipe
from safetensors.torch import load_file, save_file
from small_model_files import DATA, DIFFUSION_MODEL
from tiny_flux import ignore_progress, random_samples
from torch import Tensor

import_comfyui()

import comfy.model_management as mm  # noqa: E402
import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
from engine_sampling import lora_of, sample, stock_flux  # noqa: E402
from flux_fp4.nodes import baking, built_plans, paths, stages  # noqa: E402
from flux_fp4.nodes.engine_model import EngineOptions  # noqa: E402
from flux_fp4.nodes.errors import BakeError, WeightChangeError  # noqa: E402
from torch_engine import use_needs_plans  # noqa: E402

SPEC = BuildSpec(
    profile=ShapeProfile(
        max_batch=1,
        min_img_tokens=4,
        opt_img_tokens=16,
        max_img_tokens=64,
        min_txt_tokens=1,
        opt_txt_tokens=77,
        max_txt_tokens=77,
    )
)
DOUBLE, SINGLE = "double_blocks.1.img_attn.qkv.weight", "single_blocks.0.linear1.weight"
OUTSIDE = ("img_in.weight", "double_blocks.0.img_mod.lin.weight")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders with the small FLUX and an engine of it; not to be changed."""
    models = tmp_path_factory.mktemp("models")
    source = models / "diffusion_models" / DIFFUSION_MODEL
    source.parent.mkdir()
    shutil.copyfile(DATA / DIFFUSION_MODEL, source)
    root = models / paths.MODEL_FOLDER
    path = root / "small" / "small.safetensors"
    options = with_recipe("nvfp4-max", fp8_attention=False)
    samples = random_samples(open_source(source).config)
    quantize(source, path, options, samples, statistics=root / ".statistics")
    export_blocks(path, ignore_progress)
    build_engine(path.parent, SPEC, ignore_progress)
    return models


@pytest.fixture
def models(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same, for the test to change."""
    models = tmp_path / "models"
    shutil.copytree(finished, models)
    folders = {
        name: ([str(models / name)], {".safetensors"})
        for name in (paths.MODEL_FOLDER, "diffusion_models")
    }
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", folders)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    with torch.inference_mode():
        yield models
    mm.unload_all_models()


class Progress:
    """What a node shows; cancels before a phase."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.text = ""
        self.cancel_before: str | None = None

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase == self.cancel_before:
            raise mm.InterruptProcessingException
        self.phases.append(phase)

    def show(self, text: str) -> None:
        self.text = text

    def quantized(self) -> list[str]:
        """Return the blocks that were quantized since the last call."""
        phases, self.phases = self.phases, []
        return list(dict.fromkeys(p.split()[1] for p in phases if p.startswith("Quantizing")))


@pytest.fixture(autouse=True)
def progress(monkeypatch: pytest.MonkeyPatch) -> Progress:
    progress = Progress()
    monkeypatch.setattr(baking, "progress_of_running_node", lambda: progress)
    monkeypatch.setattr(built_plans, "progress_of_running_node", lambda: progress)
    return progress


def engine_dir(models: Path) -> Path:
    return models / paths.MODEL_FOLDER / "small" / SPEC.folder_name


def baked_model(models: Path) -> Any:
    return stages.load(engine_dir(models), "reference", EngineOptions(bakes_lora=True))


def bakes(models: Path) -> list[Path]:
    folder = engine_dir(models).parent / "baked"
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def with_lora(model: Any, lora: dict[str, Tensor], strength: float = 1.0) -> Any:
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]


def lora(*weights: str, factor: float = 0.1) -> dict[str, Tensor]:
    return {k: v * factor if "up" in k else v for k, v in lora_of(*weights).items()}


def dora(weight: str) -> dict[str, Tensor]:
    name = "lora_unet_" + weight.removesuffix(".weight").replace(".", "_")
    base = stock_flux().model.diffusion_model.state_dict()[weight]
    norms = torch.linalg.vector_norm(base.float(), dim=0, keepdim=True)
    return {**lora(weight), f"{name}.dora_scale": norms * 1.02}


@pytest.mark.parametrize("adapter", [lora(DOUBLE, SINGLE, *OUTSIDE), dora(SINGLE)])
def test_baked_lora_is_as_near_to_stock_as_the_base(
    models: Path, adapter: dict[str, Tensor]
) -> None:
    stock, model = stock_flux(), baked_model(models)
    base_db = sqnr_db(sample(stock), sample(model))
    expected = sample(with_lora(stock, adapter))
    found = sample(with_lora(model, adapter))
    change_db, db = sqnr_db(expected, sample(stock)), sqnr_db(expected, found)
    # measured: 13.6 and 10.6 dB; 13.4 dB without, and the changes are -1.5 and 6.1 dB
    told = f"{db:.1f} dB with the LoRA, {base_db:.1f} dB without, the LoRA {change_db:.1f} dB"
    assert db > base_db - 4, told
    assert db > change_db + 3, told


def test_baked_weights_are_those_that_stock_merges(models: Path) -> None:
    adapter = {**lora(DOUBLE), **dora(SINGLE)}
    stock = with_lora(stock_flux(), adapter, 0.8)
    sample(stock)
    sample(with_lora(baked_model(models), adapter, 0.8))
    (folder,) = bakes(models)
    header = QuantizedCheckpoint.read(folder / "blocks.safetensors")
    reports = {report.name: report for report in header.metadata.linears}
    for key in (DOUBLE, SINGLE):
        name = key.removesuffix(".weight")
        merged = stock.model.diffusion_model.get_parameter(key).float()
        stored = stored_weight(name.split(".", 2)[2], header.linear_tensors(name))
        db = sqnr_db(merged, stored)
        # measured: 20.4 and 20.3 dB, what NVFP4 leaves of any weight
        assert db > 19, f"{name}: {db:.1f} dB"
        assert db == pytest.approx(reports[name].weight_sqnr_db, abs=0.3)


def test_only_touched_blocks_are_baked(models: Path, progress: Progress) -> None:
    model = baked_model(models)
    sample(with_lora(model, lora(DOUBLE, SINGLE, *OUTSIDE)))
    assert progress.quantized() == ["double_blocks.1", "single_blocks.0"]
    assert progress.text == ""  # nothing stays on the sampler
    (folder,) = bakes(models)
    header = QuantizedCheckpoint.read(folder / "blocks.safetensors")
    assert header.metadata.block_names == ("double_blocks.1", "single_blocks.0")
    whole = (engine_dir(models).parent / "small.safetensors").stat().st_size
    assert header.path.stat().st_size < whole / 2


def test_lora_outside_of_plans_bakes_nothing(models: Path) -> None:
    model = baked_model(models)
    before = sample(model)
    assert not torch.equal(sample(with_lora(model, lora(*OUTSIDE))), before)
    assert bakes(models) == []


def test_another_strength_is_baked_and_a_known_one_is_found(
    models: Path, progress: Progress
) -> None:
    model, adapter = baked_model(models), lora(SINGLE)
    full, half = with_lora(model, adapter), with_lora(model, adapter, 0.5)
    first = sample(full)
    assert progress.quantized() == ["single_blocks.0"]
    second = sample(half)
    assert progress.quantized() == ["single_blocks.0"]
    assert not torch.equal(first, second)
    assert torch.equal(sample(full), first)
    assert torch.equal(sample(half), second)
    # another process that loads the same LoRA from its file
    again = with_lora(baked_model(models), lora(SINGLE), 0.5)
    assert torch.equal(sample(again), second)
    assert progress.phases == []
    assert len(bakes(models)) == 2


def test_base_comes_back_bit_for_bit(models: Path) -> None:
    model = baked_model(models)
    before = sample(model)
    bytes_before = model.engine_bytes()
    patched = with_lora(model, lora(DOUBLE, SINGLE))
    changed = sample(patched)
    assert not torch.equal(changed, before)
    assert torch.equal(sample(model), before)
    assert model.engine_bytes() == bytes_before
    assert torch.equal(sample(with_lora(model, lora(DOUBLE), 0.0)), before)
    mm.unload_all_models()
    assert torch.equal(sample(patched), changed)
    del patched
    gc.collect()
    assert torch.equal(sample(model), before)


@pytest.mark.parametrize("phase", ["Quantizing single_blocks.0", "Exporting single_blocks.0"])
def test_cancel_leaves_nothing_that_is_used_later(
    models: Path, progress: Progress, phase: str
) -> None:
    model = baked_model(models)
    before = sample(model)
    patched = with_lora(model, lora(DOUBLE, SINGLE))
    progress.cancel_before = phase
    with pytest.raises(mm.InterruptProcessingException):
        sample(patched)
    assert torch.equal(sample(model), before)
    progress.cancel_before = None
    resumed = sample(patched)
    # the same as without a cancel
    for folder in bakes(models):
        shutil.rmtree(folder)
    assert torch.equal(sample(with_lora(baked_model(models), lora(DOUBLE, SINGLE))), resumed)


def test_plans_are_built_for_tensorrt(
    models: Path, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_dir(models)
    model = baked_model(models)

    def missing(selection: Selection) -> list[str]:
        manifest = load_manifest(folder)
        plans = selected_plans(folder, manifest, selection)
        return [block for block in manifest.expected_blocks if block not in plans]

    # the reference needs no plans: answer as the executor of a GPU does
    use_needs_plans(monkeypatch, model.model.engine, missing)
    sample(with_lora(model, lora(SINGLE)))
    assert "Built single_blocks.0" in progress.phases
    (bake,) = bakes(models)
    assert missing(Selection(baked=BakedBlocks(bake, ("single_blocks.0",)))) == []
    assert len(list((bake / folder.name).glob("*.plan"))) == 1


def test_oldest_bakes_go(models: Path, progress: Progress) -> None:
    model = baked_model(models)
    strengths = [0.1 * index for index in range(1, baking.KEPT + 2)]
    patched = {strength: with_lora(model, lora(SINGLE), strength) for strength in strengths}
    pictures = {strength: sample(model) for strength, model in patched.items()}
    assert len(bakes(models)) == baking.KEPT
    progress.quantized()
    assert torch.equal(sample(patched[strengths[1]]), pictures[strengths[1]])
    assert progress.quantized() == []
    assert torch.equal(sample(patched[strengths[0]]), pictures[strengths[0]])
    assert progress.quantized() == ["single_blocks.0"]


def test_bake_in_use_stays_when_the_clock_was_set_back(models: Path) -> None:
    root = models / "baked"
    for index in range(baking.KEPT + 2):
        folder = root / f"{index:032x}"
        folder.mkdir(parents=True)
        os.utime(folder, (2_000_000_000 + index,) * 2)
    used = root / f"{0:032x}"
    os.utime(used, (1_000_000_000,) * 2)
    baking._remove_oldest(root, used)
    left = {folder.name for folder in root.iterdir()}
    newest = {f"{index:032x}" for index in range(3, baking.KEPT + 2)}
    assert left == {used.name} | newest


def test_bake_that_was_deleted_is_made_again(models: Path, progress: Progress) -> None:
    patched = with_lora(baked_model(models), lora(SINGLE))
    expected = sample(patched)
    mm.unload_all_models()
    shutil.rmtree(engine_dir(models).parent / "baked")
    progress.quantized()
    assert torch.equal(sample(patched), expected)
    assert progress.quantized() == ["single_blocks.0"]


def test_mode_survives_clones_and_a_second_device(models: Path, progress: Progress) -> None:
    patched = with_lora(baked_model(models).clone(), lora(SINGLE))
    expected = sample(patched)
    second = patched.deepclone_multigpu(torch.device("cpu"))
    assert second.model.engine is not patched.model.engine
    progress.quantized()
    assert torch.equal(sample(second), expected)
    assert progress.quantized() == []
    second.detach()


def test_other_mode_bakes_nothing(models: Path) -> None:
    sample(with_lora(stages.load(engine_dir(models), "reference", EngineOptions()), lora(SINGLE)))
    assert bakes(models) == []


REMEDY = ", or choose lora 'runtime' in 'Load FLUX FP4 Engine', which needs no original weights."


def test_missing_source_is_named(models: Path) -> None:
    (models / "diffusion_models" / DIFFUSION_MODEL).unlink()
    model = baked_model(models)
    before = sample(model)
    with pytest.raises(BakeError) as error:
        sample(with_lora(model, lora(SINGLE)))
    assert str(error.value) == (
        f"A LoRA cannot be baked into 'small': the checkpoint '{DIFFUSION_MODEL}' that it was "
        "quantized from is gone. Put that file back into models/diffusion_models" + REMEDY
    )
    assert torch.equal(sample(model), before)


def test_changed_source_is_named(models: Path) -> None:
    path = models / "diffusion_models" / DIFFUSION_MODEL
    state = load_file(path)
    state["img_in.weight"] = state["img_in.weight"] * 1.5
    save_file(state, path)
    with pytest.raises(BakeError) as error:
        sample(with_lora(baked_model(models), lora(SINGLE)))
    assert str(error.value) == (
        f"A LoRA cannot be baked into 'small': '{DIFFUSION_MODEL}' in models/diffusion_models is "
        "not the file it was quantized from. Put the original file in its place" + REMEDY
    )


def test_source_is_found_in_a_sub_folder_beside_another_of_its_name(models: Path) -> None:
    folder = models / "diffusion_models"
    (folder / "b").mkdir()
    (folder / DIFFUSION_MODEL).rename(folder / "b" / DIFFUSION_MODEL)
    state = load_file(folder / "b" / DIFFUSION_MODEL)
    (folder / "a").mkdir()
    save_file({name: value * 1.5 for name, value in state.items()}, folder / "a" / DIFFUSION_MODEL)
    assert sample(with_lora(baked_model(models), lora(SINGLE))).isfinite().all()


def test_checkpoint_made_of_a_model_is_named(models: Path) -> None:
    model = baked_model(models)
    checkpoint = model.model.checkpoint
    metadata = checkpoint.metadata.model_copy(update={"source_layout": "model"})
    model.model.checkpoint = QuantizedCheckpoint(checkpoint.path, metadata, checkpoint.tensors)
    with pytest.raises(BakeError) as error:
        sample(with_lora(model, lora(SINGLE)))
    assert str(error.value) == (
        "A LoRA cannot be baked into 'small': it was quantized from a MODEL, and no file holds "
        "those weights. Quantize a checkpoint file with 'Quantize FLUX to FP4'" + REMEDY
    )


def test_missing_statistics_are_named(models: Path) -> None:
    shutil.rmtree(models / paths.MODEL_FOLDER / ".statistics")
    with pytest.raises(StatisticsMissingError, match=r"single_blocks\.0.*same samples"):
        sample(with_lora(baked_model(models), lora(SINGLE)))
    assert not [path for folder in bakes(models) for path in folder.glob("*.safetensors")]


def test_broken_numbers_are_refused(models: Path) -> None:
    adapter = {name: torch.full_like(value, torch.nan) for name, value in lora(SINGLE).items()}
    with pytest.raises(WeightChangeError, match="NaN"):
        sample(with_lora(baked_model(models), adapter))
