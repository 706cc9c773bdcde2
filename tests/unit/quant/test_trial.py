"""The trial's model is a corner of the checkpoint, and takes the way of the whole one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flux_fp4.quant import trial
from flux_fp4.quant.durations import EXPORT, FINISH
from flux_fp4.quant.flux.model import tensor_shapes
from flux_fp4.quant.sources.source import open_source
from flux_fp4.quant.trial import MLP_RATIO, CutSource, trial_run
from quantize_tiny import with_recipe
from tiny_flux import TINY, TINY_VARIANTS, ignore_progress, random_flux, save_flux


@pytest.mark.parametrize("variant", TINY_VARIANTS)
def test_every_tensor_is_a_corner_of_the_checkpoints(tmp_path: Path, variant: str) -> None:
    source = open_source(save_flux(random_flux(TINY_VARIANTS[variant]), tmp_path / "a.safetensors"))
    cut = CutSource(source, 128)
    config = cut.config
    assert (config.hidden_size, config.num_heads, config.mlp_ratio) == (128, 1, MLP_RATIO)
    assert (config.depth, config.depth_single_blocks) == (1, 1)
    assert config.variant == variant
    tensors = cut.tensors(cut.shapes)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == tensor_shapes(config)
    for name, tensor in source.tensors(cut.shapes).items():
        corner = tensor[tuple(map(slice, cut.shapes[name]))]
        torch.testing.assert_close(tensors[name], corner, rtol=0, atol=0)
        # the large tensor must be free to go
        assert tensors[name].untyped_storage().nbytes() == tensors[name].nbytes
    assert cut.size_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_a_narrow_model_is_not_made_wider(tmp_path: Path) -> None:
    source = open_source(save_flux(random_flux(), tmp_path / "a.safetensors"))
    assert CutSource(source, trial.WIDTH).config.hidden_size == TINY.hidden_size


@pytest.mark.parametrize(
    ("variant", "recipe", "kinds"),
    [
        ("flux1-fill", "auto", ["calibrate", "calibrate", "measure", "measure"]),
        ("flux2-dev", "nvfp4-max", ["calibrate", "calibrate"]),
    ],
)
def test_every_stage_runs_once_per_kind_of_block(
    tmp_path: Path, variant: str, recipe: str, kinds: list[str]
) -> None:
    source = open_source(save_flux(random_flux(TINY_VARIANTS[variant]), tmp_path / "a.safetensors"))
    told: list[str] = []
    folder = tmp_path / "trial"
    path = trial_run(
        source,
        with_recipe(recipe),
        folder,
        ignore_progress,
        "cpu",
        lambda work, units, seconds: told.append(work),
    )
    # the warm-up is not told
    assert [work.split()[0] for work in told[: len(kinds)]] == kinds
    assert [work.split()[:2] for work in told[len(kinds) : len(kinds) + 2]] == [
        ["quantize", "double,"],
        ["quantize", "single,"],
    ]
    assert told[-3:] == [FINISH, EXPORT, EXPORT]
    assert path.is_file()
    assert len(list(path.parent.glob("*_blocks.0.onnx"))) == 2
