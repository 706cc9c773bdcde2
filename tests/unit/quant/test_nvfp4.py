from __future__ import annotations

import pytest
import torch
from flux_fp4.quant.e2m1 import E2M1_VALUES
from flux_fp4.quant.errors.calibration import NotFiniteError
from flux_fp4.quant.errors.sources import UnsupportedWeightError
from flux_fp4.quant.nvfp4 import NVFP4Weight, fake_quantize_activation, quantize_weight
from flux_fp4.quant.sqnr import sqnr_db
from flux_fp4.tests.unit.quant.sample_weights import heavy_tails, normal, with_zero_blocks
from onnx import helper, numpy_helper


def modelopt_nvfp4(weight: torch.Tensor) -> NVFP4Weight:
    """Quantize with the installed ModelOpt's exporter."""
    from modelopt.onnx.export import NVFP4QuantExporter

    node = helper.make_node("TRT_FP4QDQ", ["w"], ["w_dq"], domain="trt", block_size=16)
    tensor = numpy_helper.from_array(weight.half().numpy(), "w")
    assert torch.equal(weight.half().float(), weight.float()), "must be exact in fp16"
    graph = helper.make_graph([node], "g", [], [], [tensor])
    model = NVFP4QuantExporter.compute_scales(helper.make_model(graph))
    model = NVFP4QuantExporter.compress_weights(model)
    found = {attribute.name: attribute for attribute in model.graph.node[0].attribute}
    return NVFP4Weight(
        # the exporter keeps row-major bytes under the shape [N/2, K]
        torch.from_numpy(numpy_helper.to_array(found["_w_f4"].t).copy()).reshape(len(weight), -1),
        torch.from_numpy(numpy_helper.to_array(found["_sw_f8_per_block"].t).copy()),
        torch.tensor(found["_sw_f32_per_tensor"].floats[0]),
    )


def on_the_grid() -> torch.Tensor:
    """Blocks of amax 6 with every representable value, midpoint and neighbour of a midpoint."""
    edges = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    values = torch.cat(
        (torch.tensor(E2M1_VALUES), edges, edges * (1 - 2**-10), edges * (1 + 2**-10))
    )
    values = torch.cat((values, -values)).half().float()
    blocks = torch.zeros(len(values), 16)
    blocks[:, 0] = 2688.0  # global scale 1
    blocks = torch.cat((blocks, torch.zeros(len(values), 16)), dim=1)
    blocks[:, 16] = 6.0  # block scale 1
    blocks[:, 17] = values
    return blocks


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(normal(128, 256), id="normal"),
        pytest.param(heavy_tails(), id="heavy_tails"),
        pytest.param(with_zero_blocks(), id="zero_blocks"),
        pytest.param(torch.zeros(2, 32), id="all_zero"),
        pytest.param(on_the_grid(), id="grid_and_ties"),
        pytest.param(normal(70, 16), id="rows_not_a_multiple_of_the_chunk"),
        pytest.param(1e-6 * normal(64, 64), id="tiny_values"),
    ],
)
def test_quantize_weight_equals_modelopts_exporter(weight: torch.Tensor) -> None:
    weight = weight.half().float()
    ours, theirs = quantize_weight(weight, "linear"), modelopt_nvfp4(weight)
    assert torch.equal(ours.packed, theirs.packed)
    assert torch.equal(ours.block_scale.view(torch.uint8), theirs.block_scale)
    assert ours.global_scale.item() == theirs.global_scale.item()


def test_dequantized_normal_weight_keeps_twenty_db() -> None:
    weight = normal(256, 512)
    db = sqnr_db(weight, quantize_weight(weight, "linear").dequantize())
    assert 19.5 < db < 23, f"SQNR {db:.2f} dB; NVFP4 of a normal weight measures about 21 dB"


@pytest.mark.parametrize("columns", [8, 24, 120])
def test_inputs_not_a_multiple_of_sixteen_are_refused_by_name(columns: int) -> None:
    with pytest.raises(UnsupportedWeightError) as caught:
        quantize_weight(torch.ones(4, columns), "double_blocks.0.img_mlp.2")
    assert caught.value.linear == "double_blocks.0.img_mlp.2"
    assert f"{columns} inputs" in str(caught.value)


def test_integer_weight_is_refused() -> None:
    with pytest.raises(UnsupportedWeightError, match=r"torch\.int8"):
        quantize_weight(torch.ones(4, 16, dtype=torch.int8), "linear1")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight = torch.ones(4, 16)
    weight[2, 3] = bad
    with pytest.raises(NotFiniteError, match="linear1"):
        quantize_weight(weight, "linear1")


def test_activation_on_the_grid_is_exact() -> None:
    x = torch.tensor([E2M1_VALUES, [-value for value in E2M1_VALUES]]).reshape(1, 16)
    assert torch.equal(fake_quantize_activation(x, torch.tensor(1.0)), x)


def test_activation_block_scale_is_its_own_amax() -> None:
    x = torch.cat((torch.full((1, 16), 3.0), torch.full((1, 16), 0.75)), dim=1)
    assert torch.equal(fake_quantize_activation(x, torch.tensor(1 / 448)), x)


def test_activation_above_the_calibrated_maximum_saturates() -> None:
    x = torch.full((1, 16), 100.0)
    quantized = fake_quantize_activation(x, torch.tensor(10.0 / 2688))
    assert torch.allclose(quantized, torch.full((1, 16), 10.0))


def test_zero_activation_stays_zero() -> None:
    x = torch.zeros(2, 32)
    x[1, 0] = 1e-12
    assert torch.equal(fake_quantize_activation(x, torch.tensor(1.0)), torch.zeros(2, 32))
