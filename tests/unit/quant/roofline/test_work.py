"""Operations and bytes of a step, against torch's counter on the real module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flux_fp4.quant.checkpoint_layout import recipe_formats
from flux_fp4.quant.flux.config import FluxConfig, block_linears
from flux_fp4.quant.flux.model import Flux, image_ids
from flux_fp4.quant.recipe import QuantizeOptions, named_recipe
from flux_fp4.quant.roofline.published import PUBLISHED
from flux_fp4.quant.roofline.work import (
    ATTENTION,
    BRANCHES,
    LINEARS,
    LORA,
    MODULATION,
    StepOptions,
    StepSizes,
    activation_bytes,
    step_kernels,
    weight_bytes,
)
from tiny_flux import TINY_VARIANTS
from torch.utils.flop_counter import FlopCounterMode

SIZES = StepSizes(batch=2, img_tokens=6 * 4, txt_tokens=10)
MODELS = {**{f"tiny {name}": tiny for name, tiny in TINY_VARIANTS.items()}, **PUBLISHED}


def options_of(config: FluxConfig, recipe: str = "nvfp4-max", **options: Any) -> StepOptions:
    formats = recipe_formats(config, QuantizeOptions(recipe=named_recipe(recipe)))
    return StepOptions(formats, **options)


def counted(config: FluxConfig, device: str) -> dict[str, int]:
    """Run the whole module and return torch's operations by module name."""
    with torch.device(device):
        model = Flux(config).bfloat16()
        batch, img, txt = SIZES.batch, SIZES.img_tokens, SIZES.txt_tokens
        inputs = (
            torch.zeros(batch, img, config.in_channels * config.patch_size**2).bfloat16(),
            image_ids(6 * config.patch_size, 4 * config.patch_size, batch, config.patch_size,
                      len(config.axes_dim)),
            torch.zeros(batch, txt, config.context_in_dim).bfloat16(),
            torch.zeros(batch, txt, len(config.axes_dim)),
            torch.zeros(batch).bfloat16(),
            torch.zeros(batch, config.vec_in_dim).bfloat16() if config.vec_in_dim else None,
            torch.zeros(batch).bfloat16() if config.guidance_embed else None,
        )  # fmt: skip
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*(x.to(device) if x is not None else None for x in inputs))
    return {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}


@pytest.mark.parametrize("variant", MODELS)
def test_operations_are_those_that_torch_counts(variant: str) -> None:
    config = MODELS[variant]
    found = counted(config, "meta")
    kernels = step_kernels(config, SIZES, options_of(config, modulation_per_step=True))
    assert sum(kernel.flops for kernel in kernels) == found["Global"]
    for block in (config.block_names[0], config.block_names[-1]):
        of_block = sum(k.flops for k in kernels if k.block == block)
        # modulation vectors are made before the block is called
        assert of_block == found[f"Flux.{block}"], block
        attention = sum(k.flops for k in kernels if (k.block, k.part) == (block, ATTENTION))
        assert attention == found[f"Flux.{block}.attention"]


def test_flux1_dev_at_a_megapixel() -> None:
    config = PUBLISHED["flux1-dev"]
    kernels = step_kernels(config, StepSizes(1, 4096, 512), options_of(config))
    tera = {part: sum(k.flops for k in kernels if k.part == part) / 1e12
            for part in (LINEARS, ATTENTION)}  # fmt: skip
    assert tera == pytest.approx({LINEARS: 59.5, ATTENTION: 14.9}, rel=0.01)


def test_weights_take_what_a_checkpoint_stores() -> None:
    """4.84 GB by docs/benchmarks.md, where 4.9 GB hold biases, norms and scales too."""
    config = PUBLISHED["flux1-dev"]
    assert weight_bytes(config, options_of(config)) == pytest.approx(4.84e9, rel=0.01)
    fp8, bf16 = (weight_bytes(config, options_of(config, recipe)) for recipe in ("fp8", "bf16"))
    assert (bf16 / fp8, bf16) == (2, pytest.approx(17.2e9, rel=0.01))


def test_activations_are_what_the_builder_reports() -> None:
    config = PUBLISHED["flux1-dev"]
    found = activation_bytes(config, StepSizes(1, 4096, 512), options_of(config))
    assert found == pytest.approx(397_246_464, rel=0.05)


def test_branches_and_lora_add_two_thin_gemms_to_each_linear() -> None:
    config = TINY_VARIANTS["flux1-dev"]
    plain = step_kernels(config, SIZES, options_of(config))
    added = step_kernels(config, SIZES, options_of(config, branch_rank=16, lora_rank=8))
    assert [k for k in added if k.part not in (BRANCHES, LORA)] == plain
    linears = sum(len(block_linears(block)) for block in config.block_names)
    for part, rank in ((BRANCHES, 16), (LORA, 8)):
        found = [kernel for kernel in added if kernel.part == part]
        assert len(found) == linears
        assert {kernel.unit for kernel in found} == {"bf16"}
        single = next(k for k in found if k.block == "single_blocks.0" and k.name == "linear2")
        width, tokens = config.hidden_size, 2 * (24 + 10)
        assert single.flops == 2 * tokens * rank * (2 * width + config.mlp_size)


def test_branches_are_on_fp4_linears_only() -> None:
    config = TINY_VARIANTS["flux1-dev"]
    kernels = step_kernels(config, SIZES, options_of(config, "fp8", branch_rank=16))
    assert BRANCHES not in {kernel.part for kernel in kernels}


def test_modulation_is_read_per_step_only_where_it_stays() -> None:
    config = TINY_VARIANTS["flux1-dev"]
    once = {kernel.part for kernel in step_kernels(config, SIZES, options_of(config))}
    assert MODULATION not in once
    each = step_kernels(config, SIZES, options_of(config, modulation_per_step=True))
    found = [kernel for kernel in each if kernel.part == MODULATION]
    double, single = config.depth, config.depth_single_blocks
    width = config.hidden_size
    assert sum(k.bytes for k in found) == 2 * width * width * (12 * double + 3 * single)


def test_narrower_formats_move_less() -> None:
    config = PUBLISHED["flux1-dev"]
    sizes = StepSizes(1, 4096, 512)
    moved = [
        sum(kernel.bytes for kernel in step_kernels(config, sizes, options))
        for options in (
            options_of(config),
            options_of(config, "fp8"),
            options_of(config, "bf16", fp8_attention=False),
        )
    ]
    assert moved == sorted(moved)
