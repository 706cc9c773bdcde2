from __future__ import annotations

import json
import math

import pytest
from flux_fp4.quant.flux.config import FluxConfig, config_from_shapes
from flux_fp4.quant.flux.model import tensor_shapes
from tiny_flux import TINY, TINY_FLUX2, TINY_VARIANTS

# black-forest-labs/flux2, model.py; the last number is what each model is called after
FULL_SIZE = {
    "dev": ({"hidden_size": 6144, "depth": 8, "depth_single_blocks": 48}, 15360, True, 32),
    "klein_9b": ({"hidden_size": 4096, "depth": 8, "depth_single_blocks": 24}, 12288, False, 9),
    "klein_4b": ({"hidden_size": 3072, "depth": 5, "depth_single_blocks": 20}, 7680, False, 4),
}


@pytest.mark.parametrize("variant", TINY_VARIANTS)
def test_shapes_give_the_config_back(variant: str) -> None:
    config = TINY_VARIANTS[variant]
    assert config_from_shapes(tensor_shapes(config)) == config
    assert config.variant == variant


@pytest.mark.parametrize("model", FULL_SIZE)
def test_flux2_has_as_many_parameters_as_its_name_says(model: str) -> None:
    sizes, context, guidance, billions = FULL_SIZE[model]
    config = TINY_FLUX2.model_copy(
        update={
            **sizes,
            "context_in_dim": context,
            "guidance_embed": guidance,
            "num_heads": sizes["hidden_size"] // 128,
        }
    )
    shapes = tensor_shapes(config)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    assert round(parameters / 1e9) == billions, f"{parameters:,}"


def test_header_written_before_flux2_still_reads() -> None:
    old = TINY.model_dump(mode="json")
    for name in ("shared_modulation", "gated_mlp", "bias", "txt_ids_dims"):
        del old[name]
    for name in ("default_ref_method", "ref_index_scale"):
        del old[name]
    assert FluxConfig.model_validate_json(json.dumps(old)) == TINY


@pytest.mark.parametrize(
    ("variant", "tensor", "shape", "text"),
    [
        ("flux1-dev", "img_in.weight", (256, 132), "img_in takes 132 .* takes 64, 128, 384"),
        ("flux2-dev", "img_in.weight", (256, 256), "img_in takes 256 .* FLUX.2 it takes 128"),
        ("flux2-dev", "double_blocks.0.img_mlp.0.weight", (1024, 256), "gives 1024 .* gives 1536"),
        ("flux1-dev", "final_layer.linear.weight", (128, 256), "gives 128 .* gives 64"),
        ("flux2-klein", "img_in.weight", (192, 128), "hidden size 192 is not a multiple of 128"),
    ],
    ids=["patches", "flux2_control", "ungated_mlp", "outputs", "heads"],
)
def test_shapes_of_another_model_are_named(
    variant: str, tensor: str, shape: tuple[int, ...], text: str
) -> None:
    shapes = tensor_shapes(TINY_VARIANTS[variant]) | {tensor: shape}
    with pytest.raises(ValueError, match=text):
        config_from_shapes(shapes)


def test_missing_block_is_named() -> None:
    shapes = {k: v for k, v in tensor_shapes(TINY).items() if "single_blocks.0." not in k}
    with pytest.raises(ValueError, match=r"single_blocks holds blocks \[1\]"):
        config_from_shapes(shapes)
